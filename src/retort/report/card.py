"""The model card of an exported folder: its README.md, Markdown with YAML in front.

Names, paths and prompts come from elsewhere; `markdown` keeps them text. Of every path the card
shows the last part alone, since the rest tells of the machine that trained the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from retort._version import __version__
from retort.console import format_count
from retort.recipe import (
    BUNDLED_TEACHER,
    Distill,
    DistillRecipe,
    HiddenStates,
    Objective,
    Stage,
    Worked,
    parse,
)
from retort.report.curves import Curves, ModelCurve
from retort.report.markdown import fenced, inline, one_line, table, to_yaml
from retort.report.wording import interval

HYBRID = "GraniteMoeHybridForCausalLM"
HUB_DATASETS = {"gsm8k": "openai/gsm8k", "math500": "HuggingFaceH4/MATH-500"}
COMMANDS = {
    "vLLM": "vllm serve PATH",
    "SGLang": "python -m sglang.launch_server --model-path PATH",
    "llama.cpp": "python convert_hf_to_gguf.py PATH",
}
PLAIN_INPUTS = 'tokenizer(prompts, return_tensors="pt", padding=True)'
CHAT_INPUTS = """tokenizer.apply_chat_template(
    [[{"role": "user", "content": prompt}] for prompt in prompts],
    add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True,
)"""
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", padding_side="left")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompts = ["What is 2 + 3?", "Tom has 4 apples and eats one. How many are left?"]
inputs = INPUTS
outputs = model.generate(**inputs, max_new_tokens=200)
new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
print(tokenizer.batch_decode(new_tokens, skip_special_tokens=True))"""
TOO_OLD = (
    "It needs transformers RELEASE or newer. Older releases load it without a word and answer with "
    "noise: they normalise the output of a Mamba-2 mixer over all of its groups together."
)
MEASURES = (
    "Coverage at k is the chance that at least one of k completions is right, majority the chance "
    "that the most frequent answer among them is. Intervals are 95 % over problems: they say how "
    "much another draw of problems could change a number, not another training run."
)


@dataclass(frozen=True)
class Card:
    """What a card tells; sections about what is not known are left out.

    base_model: the teacher, by its id on the hub or as a folder, of which the name is shown.
    license: as the hub spells it, such as `llama3.2`; None when none is stated.
    layers: facts about the architecture, as pairs of what and value.
    curves: a report; only this model and its teacher are shown when this model is among them.
    runtimes: programs that read the folder, of transformers and those in `COMMANDS`.
    oldest_transformers: the release of transformers below which its answers would be noise.
    chat: whether the tokenizer has a chat template.
    """

    title: str
    architecture: str
    layers: Sequence[tuple[str, str]] = ()
    base_model: str | None = None
    license: str | None = None
    recipe: DistillRecipe | None = None
    curves: Curves | None = None
    runtimes: Sequence[str] = ("transformers", "vLLM", "SGLang")
    oldest_transformers: str | None = None
    chat: bool = False

    @property
    def hybrid(self) -> bool:
        """Whether there are Mamba-2 layers."""
        return self.architecture == HYBRID

    @property
    def distilled(self) -> bool:
        """Whether the recipe says that it learnt from a teacher."""
        stages = self.recipe.stages if self.recipe else ()
        return any(stage.objective.kind != "supervised" for stage in stages)

    @property
    def base(self) -> str | None:
        """The teacher's name: its hub id, or the name of its folder."""
        if self.base_model:
            return self.base_model if _is_hub_id(self.base_model) else _last(self.base_model)
        return _last(self.recipe.teacher) if self.recipe and self.recipe.teacher else None


def write(card: Card) -> str:
    """The card as Markdown with YAML front matter."""
    sections = {
        "How to run it": _running(card) if card.runtimes else "",
        "Architecture": table(("what", "value"), card.layers),
        "Training": _training(card.recipe) if card.recipe else "",
        "Results": _results(card),
        "Limitations": "\n".join(f"- {each}" for each in _limitations(card)),
        "How it was made": f"This folder and this card were written by Retort {__version__}.",
    }
    parts = [_front_matter(card), f"# {inline(card.title)}", _summary(card)]
    parts += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return "\n\n".join(parts) + "\n"


def find_recipe(folder: Path) -> DistillRecipe | None:
    """The recipe of the finished distillation into `folder`, from the work folder beside it.

    None when there is none, or when it did not finish: the model is then not that recipe's.
    Raises ValueError when the file is damaged.
    """
    folder = Path(os.path.abspath(folder))
    work = folder.parent / f"{folder.name}.training"
    path = work / "recipe.json"
    if not (work / "finished").is_file() or not path.is_file():
        return None
    try:
        told = json.loads(path.read_bytes())
        # Where a run is, it does not say itself: it may have been moved.
        return parse(DistillRecipe, told | {"out": folder} if isinstance(told, dict) else told)
    except (ValueError, RecursionError) as error:
        why = "; ".join(str(error).splitlines())
        raise ValueError(f"{path}: not the recipe of a distillation ({why})") from None


# Sections


def _front_matter(card: Card) -> str:
    # No base_model_relation: none of the hub's words is right for a student with new mixers. And no
    # base_model that is a folder's name: the hub would link to whatever has that name there.
    base = card.base_model
    tags = {"retort": True, "mamba2": card.hybrid, "distillation": card.distilled}
    values = {
        "license": one_line(card.license or "").lower(),
        "base_model": base if base and _is_hub_id(base) else "",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag, is_right in tags.items() if is_right],
        "datasets": _hub_datasets(card.recipe) if card.recipe else [],
    }
    return f"---\n{to_yaml({key: value for key, value in values.items() if value})}---"


def _summary(card: Card) -> str:
    kind = "language model with Mamba-2 layers" if card.hybrid else "language model"
    made = "distilled" if card.distilled else "made"
    base = inline(card.base) if card.base else ""
    origin, terms = (f" from {base}", f" The terms of {base} apply.") if base else ("", "")
    if card.license:
        terms = f"License: {inline(card.license)}."
    else:
        terms = f"No license is stated here.{terms}"
    return f"A {kind}, {made}{origin} with Retort.\n\n{terms}"


def _running(card: Card) -> str:
    *others, last = map(inline, card.runtimes)
    readers = f"{', '.join(others)} and {last}" if others else last
    commands = [COMMANDS[name] for name in card.runtimes if name in COMMANDS]
    parts = [
        f"The weights are in the format {inline(card.architecture)}, for {readers}. PATH is this "
        "folder, or its name on the hub. The commands were not run when this card was written."
    ]
    if "transformers" in card.runtimes:
        if card.oldest_transformers:
            parts.append(TOO_OLD.replace("RELEASE", card.oldest_transformers))
        inputs = CHAT_INPUTS if card.chat else PLAIN_INPUTS
        enters = "the states of the Mamba-2 layers" if card.hybrid else "the text"
        parts.append(fenced(SNIPPET.replace("INPUTS", inputs), "python"))
        parts.append(f"Pad on the left: padding behind a prompt would enter {enters}.")
    return "\n\n".join([*parts, *([fenced("\n".join(commands), "sh")] if commands else [])])


def _training(recipe: DistillRecipe) -> str:
    head = ("stage", "objective", "data", "tokens", "rows × length", "learning rate")
    # As `retort distill` reads it, less what does not change the model.
    values = _nameless(recipe.model_dump(exclude={"force", "checkpoints", "device"}))
    tokens = format_count(sum(stage.tokens for stage in recipe.stages))
    return "\n\n".join(
        [
            f"Trained on {tokens} tokens in {_count(len(recipe.stages), 'stage')}:",
            table(head, map(_stage, recipe.stages)),
            "The recipe; of each path only the last part is shown:",
            fenced(to_yaml(values).rstrip("\n"), "yaml"),
        ]
    )


def _stage(stage: Stage) -> list[str]:
    return [
        stage.name,
        _objective(stage.objective),
        _source(stage),
        f"{stage.tokens:,}",
        f"{stage.rows} × {stage.length}",
        f"{stage.optim.lr:g}",
    ]


def _results(card: Card) -> str:
    rows = _measured(card)
    if not rows or not card.curves:
        return ""
    first = rows[0][1]
    asked = inline(_problems(first.recipe.get("problems")))
    where = f"On {_count(first.problems, 'problem')}{f' of {asked}' if asked else ''}"
    points = [
        (name, str(point.k), interval(point.coverage), interval(point.majority))
        for name, model in rows
        for point in model.points
    ]
    measured = table(("model", "k", "coverage", "majority"), points)
    by = f"measured with Retort {inline(card.curves.retort)}"
    return f"{where}, {by}:\n\n{measured}\n\n{MEASURES}"


def _measured(card: Card) -> list[tuple[str, ModelCurve]]:
    """What the results show, by name and role: this model and its teacher, or else all."""
    recipe = card.recipe
    own = {card.title, _last(card.title)} | ({recipe.out.name} if recipe else set())
    taught = {recipe.teacher.name} if recipe and recipe.teacher else set()
    taught |= {card.base, _last(card.base)} if card.base else set()
    models = card.curves.models if card.curves else ()
    ours = [(f"{each.name} (this model)", each) for each in models if _names(each) & own]
    theirs = [(f"{each.name} (teacher)", each) for each in models if _names(each) & (taught - own)]
    return [*ours, *theirs] if ours else [(each.name, each) for each in models]


def _names(model: ModelCurve) -> set[str]:
    """What a measured model goes by: the name of its run, and its folder's."""
    return {model.name, _last(model.recipe.get("model", model.name))}


def _limitations(card: Card) -> list[str]:
    found = []
    if card.hybrid:
        found.append(
            "The state of a Mamba-2 layer has a fixed size: what stands far back in a long text "
            "can be lost, and copying it exactly is harder than with attention."
        )
    if card.recipe:
        sources = inline("; ".join(dict.fromkeys(map(_source, card.recipe.stages))))
        longest = max(stage.length for stage in card.recipe.stages)
        found.append(
            f"It was trained on {sources}, in rows of at most {longest} tokens. It can do worse on "
            "other texts, and on longer ones."
        )
    if card.distilled:
        found.append("It was trained to answer as its teacher does, mistakes included.")
    return found if _measured(card) else [*found, "No results came with it."]


# What recipes say


def _objective(objective: Objective) -> str:
    match objective:
        case Distill(kind=kind, direction=way) | HiddenStates(kind=kind, compare=way):
            return f"{kind} ({way})"
    return objective.kind


def _source(stage: Stage) -> str:
    data = stage.data.problems if isinstance(stage.data, Worked) else stage.data
    return _problems(data.model_dump())


def _problems(values: object) -> str:
    """The kind of data, and its file or split: a file has no split."""
    if not isinstance(values, Mapping):
        return ""
    place = _last(values["path"]) if values.get("path") else values.get("split")
    return f"{values.get('kind')}{f' ({place})' if place else ''}"


def _hub_datasets(recipe: DistillRecipe) -> list[str]:
    problems = [stage.data.problems for stage in recipe.stages if isinstance(stage.data, Worked)]
    kinds = dict.fromkeys(each.kind for each in problems if not getattr(each, "path", None))
    return [HUB_DATASETS[kind] for kind in kinds if kind in HUB_DATASETS]


def _nameless(value: Any) -> Any:
    """YAML's own types, and of paths the last part."""
    match value:
        case PurePath():
            return "bundled" if value == BUNDLED_TEACHER else _last(value)
        case Mapping():
            return {key: _nameless(each) for key, each in value.items() if each is not None}
        case list() | tuple():
            return [_nameless(each) for each in value]
    return value


def _last(path: object) -> str:
    """The last part of a path, of whichever system."""
    return re.split(r"[\\/]+", str(path).rstrip("\\/"))[-1]


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None


def _count(n: int, unit: str) -> str:
    return f"{n:,} {unit}{'' if n == 1 else 's'}"
