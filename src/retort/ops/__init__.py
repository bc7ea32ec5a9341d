"""Pure functions on tensors: the maths of the mixers, each with a plain reference."""
