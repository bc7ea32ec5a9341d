"""What graded runs show: coverage and majority against completions and against seconds."""

from retort.report.metrics import majority_at_k, pass_at_k
from retort.report.run import report
from retort.report.selection import best_of_k, weighted_at_k

__all__ = ["best_of_k", "majority_at_k", "pass_at_k", "report", "weighted_at_k"]
