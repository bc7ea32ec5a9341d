"""Distillation: the four objectives, the one loop, and states that survive being killed."""
