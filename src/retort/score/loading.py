"""Reward models from checkpoint folders, with one line for a folder that does not fit its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from retort.data.chat import load_tokenizer
from retort.model.devices import fast_dtype, open_device
from retort.recipe import ScoreRecipe
from retort.score.models import Kind, Outcome, PlusMinus, Qwen, QwenScorer, RewardModel, Scale
from retort.score.verifier import open_verifier, read_settings

WANTED = {
    "rlhflow": ("ForCausalLM", "a causal language model"),
    "qwen": ("ForProcessRewardModel", "Qwen2 with a head of two layers"),
    "outcome": ("ForSequenceClassification", "a sequence classifier"),
}
"""How the names of architectures end that each kind is made of, and what they are in words."""


def dtype_of(recipe: ScoreRecipe) -> torch.dtype:
    """The dtype a recipe asks for, or what suits its device."""
    named = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    return named[recipe.dtype] if recipe.dtype else fast_dtype(torch.device(recipe.device))


def scale_of(recipe: ScoreRecipe) -> tuple[Kind, Scale]:
    """What the scores are of, and what numbers they are, before any model is loaded."""
    if recipe.kind == "outcome":
        return "outcome", "logit"
    if recipe.kind == "verifier" and not read_settings(recipe.model).every_step:
        return "outcome", "probability"
    return "process", "probability"


def check(recipe: ScoreRecipe) -> None:
    """Raises ValueError, in one line, for a folder that is no reward model of the recipe's kind."""
    if recipe.kind == "verifier":
        read_settings(recipe.model)
        return
    names = _architectures(recipe.model)
    ending, words = WANTED[recipe.kind]
    if not any(name.endswith(ending) for name in names):
        raise ValueError(
            f"{recipe.model}: kind={recipe.kind} is {words} (...{ending}), and this folder has "
            f"{', '.join(names) or 'no architecture named in its config.json'} "
            "(docs/scoring.md#reward-models)"
        )


def open_model(recipe: ScoreRecipe) -> RewardModel:
    """The recipe's reward model on its device. Raises ValueError as `check` does, and for weights
    or a tokenizer that do not fit.
    """
    check(recipe)
    if recipe.kind == "verifier":
        return open_verifier(recipe.model, dtype_of(recipe), recipe.device)
    tokenizer = load_tokenizer(recipe.model)
    match recipe.kind:
        case "rlhflow":
            return PlusMinus(_pretrained(AutoModelForCausalLM, recipe), tokenizer)
        case "qwen":
            scorer = _pretrained(QwenScorer, recipe)
            assert isinstance(scorer, QwenScorer)
            return Qwen(scorer, tokenizer)
        case "outcome":
            module = _pretrained(AutoModelForSequenceClassification, recipe)
            if (labels := module.config.num_labels) != 1:
                raise ValueError(f"{recipe.model}: has {labels} labels, an outcome model has one")
            return Outcome(module, tokenizer)


def _pretrained(kind: Any, recipe: ScoreRecipe) -> PreTrainedModel:
    """A model of a class of transformers' (or made like one), every weight of it from the folder.

    Raises ValueError, in one line, where weights are missing, misshapen or not safetensors.
    """
    device = open_device(recipe.device)
    try:
        module, told = kind.from_pretrained(
            recipe.model,
            dtype=dtype_of(recipe),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # dozens of kinds, some with pages of advice
        raise ValueError(f"{recipe.model}: cannot be loaded ({_line(error)})") from None
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{recipe.model}: is no model of kind={recipe.kind}, it has no {missing[0]}{more}"
        )
    module.config.use_cache = False
    loaded: PreTrainedModel = module.to(device).eval().requires_grad_(False)
    return loaded


def _architectures(folder: Path) -> list[str]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not valid JSON ({error})") from None
    found = values.get("architectures") if isinstance(values, dict) else None
    return [str(name) for name in found or []]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
