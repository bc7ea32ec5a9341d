"""What all recipes are made of: frozen models, and the few kinds of value they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes"
BUNDLED_TEACHER = PACKAGE / "bundled" / "teacher"

# Wording and layout of the paper's GSM8K prompt (arXiv 2502.20339, appendix).
PAPER_PROMPT = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    'Your response should end with "The final answer is [answer]" '
    "where [answer] is the response to the problem.\n"
    "Problem: {question}"
)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has one line for each mistake."""


def _bundled(value: Any) -> Any:
    return BUNDLED_TEACHER if value == "bundled" else value


def _has_question(prompt: str) -> str:
    if "{question}" not in prompt:
        raise ValueError("must contain {question}, the place where the problem's text goes")
    return prompt


ModelFolder = Annotated[Path, BeforeValidator(_bundled)]
"""A checkpoint folder; the word `bundled` is the small teacher that comes with the package."""

Prompt = Annotated[str, AfterValidator(_has_question)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Difficulty = Annotated[int, Field(ge=1, le=20)]


class Frozen(BaseModel):
    """Base of all recipe parts: immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
