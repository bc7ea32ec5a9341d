"""Problems, chat formatting, and packed training rows."""
