"""Judging completions: reward models that others have trained, and verifiers trained here."""
