"""The decoder: one class for teacher and student, its mixers, states and checkpoints."""
