"""`retort bench`: how fast models decode, read prompts and train, on the machine at hand."""
