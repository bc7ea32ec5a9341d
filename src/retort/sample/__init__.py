"""Sampling: one engine for teacher and student, and runs that resume."""
