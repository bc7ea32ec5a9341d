"""What a reward model reads of a question and a completion, and where its judgements are.

Each kind of model was trained on one way of writing them down; a token more or less is another
input. Where a judgement is read is found from the lengths of what is written before it, never by
looking for a token: completions may contain any text, the markers' too.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from retort.data.chat import (
    PINNED_DATE,
    Conversation,
    Turn,
    ask,
    prompt_ids,
)

PLUS, MINUS = "+", "-"
STEP_END = "<extra_0>"
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
"""The system prompt in the usage notes of Qwen2.5-Math-PRM."""


@dataclass(frozen=True)
class Reading:
    """Token ids, the positions whose outputs are the scores, in the order of the steps, and, where
    prompt and completion are apart, where the completion starts.
    """

    ids: list[int]
    at: list[int]
    start: int = 0


def steps_of(text: str) -> list[str]:
    """The steps of a completion: what blank lines separate, without the space around it."""
    return [text[start:stop] for start, stop in step_spans(text)]


def step_spans(text: str) -> list[tuple[int, int]]:
    """Where the steps of a completion begin and end, in characters."""
    gaps = [edge for gap in re.finditer(r"\n\s*\n", text) for edge in gap.span()]
    edges = [0, *gaps, len(text)]
    spans = [_stripped(text, *span) for span in zip(edges[::2], edges[1::2], strict=True)]
    return [(start, stop) for start, stop in spans if start < stop]


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    part = text[start:stop]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def plus_minus(tokenizer: PreTrainedTokenizerBase, question: str, text: str) -> Reading:
    """As RLHFlow's process models read: a user's turn for each step, answered with a plus sign.

    A score is read where the plus sign is predicted. No steps, no tokens.
    Raises ValueError for a chat template that cannot write such a conversation.
    """
    steps = steps_of(text)
    if not steps:
        return Reading([], [])
    whole, starts = _answered(tokenizer, [f"{question} {steps[0]}", *steps[1:]])
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, plus = encoding["input_ids"], single_token(tokenizer, PLUS)
    token = {start: i for i, (start, _) in enumerate(encoding["offset_mapping"]) if ids[i] == plus}
    if not token.keys() >= set(starts):
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template does not write an answer {PLUS!r} as "
            "one token of its own, so it is no model of RLHFlow's kind"
        )
    return Reading(ids, [token[start] - 1 for start in starts])


def _answered(tokenizer: PreTrainedTokenizerBase, asked: list[str]) -> tuple[str, list[int]]:
    """A conversation in which each turn of the user is answered with a plus sign, and where those
    begin. A turn is measured behind the first two alone, so that the work grows as the text does.
    """
    plus = Turn("assistant", PLUS)
    first = (Turn("user", asked[0]), plus)
    starts = [len(_written(tokenizer, first[:1], open_answer=True))]
    end = len(_written(tokenizer, first))
    before, closing = end, end - starts[0]
    for step in asked[1:]:
        opened = _written(tokenizer, (*first, Turn("user", step)), open_answer=True)
        starts.append(end + len(opened) - before)
        end = starts[-1] + closing
    turns = [turn for step in asked for turn in (Turn("user", step), plus)]
    whole = _written(tokenizer, tuple(turns))
    if len(whole) != end:
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template writes a turn differently where others "
            "came before, so it is no model of RLHFlow's kind"
        )
    return whole, starts


def step_ends(tokenizer: PreTrainedTokenizerBase, question: str, text: str) -> Reading:
    """As Qwen's process models read: one answer with `<extra_0>` behind each step.

    A score is read at each `<extra_0>`. No steps, no tokens.
    Raises ValueError for a tokenizer without that token and for a template that alters an answer.
    """
    steps = steps_of(text)
    if not steps:
        return Reading([], [])
    answer = "".join(step + STEP_END for step in steps)
    asked = (Turn("system", QWEN_SYSTEM), Turn("user", question))
    opening = _written(tokenizer, asked, open_answer=True)
    whole = _written(tokenizer, (*asked, Turn("assistant", answer)))
    if not whole.startswith(opening + answer):
        raise ValueError(f"{tokenizer.name_or_path}: its chat template alters the answer")
    ends = _ends([step + STEP_END for step in steps], len(opening))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    found = {stop: i for i, (_, stop) in enumerate(encoding["offset_mapping"])}
    ids, marker = encoding["input_ids"], single_token(tokenizer, STEP_END)
    if [ids[found[end]] for end in ends if end in found] != [marker] * len(steps):
        raise ValueError(f"{tokenizer.name_or_path}: its tokenizer joins {STEP_END} with text")
    return Reading(ids, [found[end] for end in ends])


def conversation(tokenizer: PreTrainedTokenizerBase, question: str, text: str) -> Reading:
    """As outcome models read: question and answer as a conversation, or without a chat template as
    the tokenizer's pair of texts. The score is that of the whole, read at its last token.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(question, text)["input_ids"]
    else:
        whole = _written(tokenizer, (Turn("user", question), Turn("assistant", text)))
        ids = tokenizer.encode(whole, add_special_tokens=False)
    return Reading(ids, [len(ids) - 1])


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, question: str, text: str, every_step: bool
) -> Reading:
    """As the model that wrote it had it: its prompt, then the completion.

    Scores are read at the end of each step, or of the last alone. No steps, no positions.
    """
    opening = prompt_ids(tokenizer, ask(prompt, question))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    stops = [stop for _, stop in encoding["offset_mapping"]]
    ends = [stop for _, stop in step_spans(text)][0 if every_step else -1 :]
    at = [len(opening) + bisect_left(stops, end) for end in ends]
    return Reading(opening + encoding["input_ids"], at, len(opening))


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is one token. Raises ValueError where it is none or several."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer has no token for {text!r}, which a reward "
            "model of this kind answers with or is asked at; choose another kind="
        )
    return int(ids[0])


def _ends(parts: list[str], start: int) -> list[int]:
    """Where each part ends when they follow one another from `start`."""
    ends = []
    for part in parts:
        start += len(part)
        ends.append(start)
    return ends


def _written(
    tokenizer: PreTrainedTokenizerBase, turns: Conversation, open_answer: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            tokenize=False,
            add_generation_prompt=open_answer,
            date_string=PINNED_DATE,
        )
    except (ValueError, TemplateError) as error:  # there is none, or it refuses
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{tokenizer.name_or_path}: its chat template ({reason})") from None
    assert isinstance(text, str)
    return text
