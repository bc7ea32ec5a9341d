"""Grading: find the answer in a completion, compare it, store the verdicts."""

from retort.grade.answers import GRADER_VERSION, Verdict, extract, grade_text, rational, vote_key
from retort.grade.grader import Grader, equivalent, vote_groups
from retort.grade.notation import normalise

__all__ = [
    "GRADER_VERSION",
    "Grader",
    "Verdict",
    "equivalent",
    "extract",
    "grade_text",
    "normalise",
    "rational",
    "vote_groups",
    "vote_key",
]
