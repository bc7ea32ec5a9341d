"""Tokenizers and chat templates: from a question to the token ids a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retort.data.faults import JOINED, REFUSED, REWRITTEN, Fault

# Llama's template writes today's date into the system prompt; a run must not depend on it.
PINNED_DATE = "26 Jul 2024"

# What transformers remembers of a folder as if it belonged to the tokenizer, and saves with it.
_OF_THIS_LOADING = ("is_local", "local_files_only")

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Turn(NamedTuple):
    """What one side of a conversation says; the role is system, user or assistant."""

    role: str
    text: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Document:
    """Token ids, and for each whether it is to be learnt; None: all of them are."""

    ids: list[int]
    learn: list[bool] | None = None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises ValueError when there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a tokenizer is read from a model's folder")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer here (tokenizer_config.json is missing); copy that of the "
            "model it was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from None
    for key in _OF_THIS_LOADING:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, where: Path
) -> None:
    """Raises ValueError unless both tokenizers give every token the same id."""
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours != theirs:
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise ValueError(
            f"{where}: its tokenizer differs from the teacher's in {differing} of {len(ours)} "
            "tokens; a student must share its teacher's tokenizer (docs/data.md#bad-data)"
        )


def ask(prompt: str, question: str) -> str:
    """The user's turn: the prompt with the question in its place (other braces mean nothing)."""
    return prompt.replace("{question}", question)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, shots: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """A user's turn and the opening of the answer; plain text for a model without a template.

    shots: earlier turns of the user, each with its answer.
    """
    if tokenizer.chat_template is None:
        before = "".join(f"{asked}\n{answered}\n\n" for asked, answered in shots)
        return tokenizer.encode(f"{before}{text}\n" if shots else text)
    earlier = [
        Turn(role, said)
        for shot in shots
        for role, said in zip(("user", "assistant"), shot, strict=True)
    ]
    written = _written(tokenizer, (*earlier, Turn("user", text)), open_answer=True)
    return tokenizer.encode(written, add_special_tokens=False)


def text_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """A text and its end, all of it learnt."""
    return Document(tokenizer.encode(text) + _end(tokenizer))


def conversation_document(
    tokenizer: PreTrainedTokenizerBase, turns: Conversation
) -> Document | Fault:
    """A rendered conversation, of which the assistant's turns and their ends are learnt.

    Where an answer begins and ends is read off the renderings of the turns before it, which is why
    a conversation whose earlier turns the template rewrites (some drop the reasoning of all answers
    but the last) is a fault, as is one that the template refuses.
    Raises ValueError for a template that does not begin a finished turn as it opens one, and for
    turns that a tokenizer without a template cannot render.
    """
    if tokenizer.chat_template is None:
        return _plain_document(tokenizer, turns)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    try:
        openings = [_written(tokenizer, turns[:i], open_answer=True) for i in answers]
        endings = [_written(tokenizer, turns[: i + 1]) for i in answers]
        whole = answers[-1:] == [len(turns) - 1]
        text = endings[-1] if whole else _written(tokenizer, turns)
    except TemplateError:
        return REFUSED
    spans = list(zip(openings, endings, strict=True))
    for before, after in spans:
        if not after.startswith(before):
            raise ValueError("the chat template opens an answer differently from how it writes one")
        if not text.startswith(after):
            return REWRITTEN
    return _learning(tokenizer, text, [(len(before), len(after)) for before, after in spans])


def _learning(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> Document | Fault:
    """The tokens of a text, those between the characters of each span to be learnt."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    learn = [False] * len(ids)
    i = 0
    for start, stop in spans:
        while i < len(ids) and offsets[i][0] < start:
            if offsets[i][1] > start:
                return JOINED
            i += 1
        while i < len(ids) and offsets[i][0] < stop:
            learn[i] = True
            i += 1
    return Document(ids, learn)


def _plain_document(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> Document:
    """A question and its answer, one after the other, for a model without a template."""
    if [turn.role for turn in turns] != ["user", "assistant"]:
        raise ValueError(
            "the tokenizer has no chat template, so conversations must be a question and its "
            "answer; use a teacher that is made for chat (docs/data.md#bad-data)"
        )
    before = tokenizer.encode(turns[0].text)
    after = tokenizer.encode(turns[1].text, add_special_tokens=False) + _end(tokenizer)
    return Document(before + after, [False] * len(before) + [True] * len(after))


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _written(
    tokenizer: PreTrainedTokenizerBase, turns: Conversation, open_answer: bool = False
) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns],
        tokenize=False,
        add_generation_prompt=open_answer,
        date_string=PINNED_DATE,
    )
    assert isinstance(text, str)
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, chat markers and a chat template.

    Single digits let a small model learn arithmetic; bytes leave no text without an encoding.
    """
    core = Tokenizer(models.BPE())
    pieces = Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
