"""What graded runs show: coverage and majority against completions and against seconds."""

from retort.report.metrics import majority_at_k, pass_at_k
from retort.report.run import report

__all__ = ["majority_at_k", "pass_at_k", "report"]
