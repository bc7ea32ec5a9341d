"""From a question to token ids, and which of them are learnt."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from retort.data.chat import (
    PINNED_DATE,
    Document,
    Turn,
    ask,
    check_same_tokenizer,
    conversation_document,
    load_tokenizer,
    prompt_ids,
    text_document,
    train_tokenizer,
)
from retort.data.faults import JOINED, REFUSED, REWRITTEN, Fault

TEXTS = ["Ada has 12 apples. Ben has 30 more apples than Ada.", "That is 12 + 30 = 42 apples."]

# The shape of Llama 3's template: a system turn with a date, headers, trimmed contents.
LLAMA = (
    "{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}"
    "<|system|>Today Date: {{ date_string }}<|end|>"
    "{%- for message in messages %}"
    "<|{{ message['role'] }}|>\n\n{{ message['content'] | trim }}<|end|>"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def tokenizer(trained: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a template that a test may replace."""
    trained.chat_template = ORIGINAL
    return trained


ORIGINAL = train_tokenizer(TEXTS, 300).chat_template


# ---------------------------------------------------------------- the tokenizer we train


@settings(max_examples=60, deadline=None)
@given(text=st.text())
@example("  two  spaces\n\n\tand 1234.50 <|end|>")
@example("é漢🙂\x00\u2028 ")
def test_any_text_comes_back(trained: PreTrainedTokenizerFast, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_digits_are_single_tokens() -> None:
    """Even if the same number is all there is to learn from."""
    tokenizer = train_tokenizer(["12 34 1234", " 12=12"] * 50, 400)
    assert tokenizer.tokenize("12 123") == ["1", "2", "Ġ", "1", "2", "3"]
    with_digits = [
        token for token in tokenizer.get_vocab() if any(c in "0123456789" for c in token)
    ]
    assert sorted(with_digits) == list("0123456789")


def test_vocabulary_is_as_large_as_asked_for() -> None:
    texts = [f"{word} {i}" for i, word in enumerate("abcdefgh" * 30)] + TEXTS
    tokenizer = train_tokenizer(texts, 280)
    assert len(tokenizer) == 280
    assert max(tokenizer.get_vocab().values()) == 279


def test_markers_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("<|user|><|assistant|><|end|><|pad|>")
    assert len(ids) == 4
    assert tokenizer.eos_token_id == ids[2]
    assert tokenizer.pad_token_id == ids[3]


def test_there_and_back(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert prompt_ids(again, TEXTS[0]) == prompt_ids(tokenizer, TEXTS[0])
    assert (again.eos_token_id, again.pad_token_id) == (1, 0)


# ---------------------------------------------------------------- prompts and answers


def conversed(tokenizer: PreTrainedTokenizerFast, *turns: str) -> Document | Fault:
    """Turns of a user and an assistant, one after the other."""
    roles = ["user", "assistant"] * len(turns)
    found = tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False))
    return conversation_document(tokenizer, found)


def answered(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Document:
    document = conversed(tokenizer, question, answer)
    assert isinstance(document, Document)
    return document


def learnt(tokenizer: PreTrainedTokenizerFast, document: Document | Fault) -> str:
    """What is to be learnt of a document, with a bar between two stretches of it."""
    assert isinstance(document, Document)
    assert document.learn is not None
    stretches: list[list[int]] = [[]]
    for id, learn in zip(document.ids, document.learn, strict=True):
        if learn:
            stretches[-1].append(id)
        elif stretches[-1]:
            stretches.append([])
    return "|".join(str(tokenizer.decode(ids)) for ids in stretches if ids)


def test_a_question_takes_its_place() -> None:
    assert ask("{x} {question} {}", "{why}?") == "{x} {why}? {}"


@pytest.mark.parametrize("template", [ORIGINAL, LLAMA, None], ids=["ours", "llama", "none"])
def test_the_answer_and_its_end_are_learnt(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer.chat_template = template
    before = prompt_ids(tokenizer, TEXTS[0])
    document = answered(tokenizer, TEXTS[0], TEXTS[1])
    assert document.learn is not None
    assert document.ids[: len(before)] == before
    assert document.learn == [False] * len(before) + [True] * (len(document.ids) - len(before))
    assert learnt(tokenizer, document) == f"{TEXTS[1]}<|end|>"
    assert TEXTS[0] in tokenizer.decode(before)


def test_our_template_word_for_word(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.decode(answered(tokenizer, "1+1?", "2").ids)
    assert text == "<|user|>1+1?<|end|><|assistant|>2<|end|>"
    assert tokenizer.decode(prompt_ids(tokenizer, "1+1?")) == "<|user|>1+1?<|end|><|assistant|>"


def test_the_date_is_pinned(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that writes today's date would give another prompt every day."""
    tokenizer.chat_template = LLAMA
    text = str(tokenizer.decode(prompt_ids(tokenizer, "1+1?")))
    assert text.startswith(f"<|system|>Today Date: {PINNED_DATE}<|end|><|user|>\n\n1+1?<|end|>")


def test_nothing_is_added_to_what_the_template_writes() -> None:
    """Many tokenizers begin every text with a token that their template writes as well."""
    tokenizer = train_tokenizer(TEXTS, 300)
    begin = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert tokenizer.encode("1+1?")[0] == tokenizer.pad_token_id
    tokenizer.chat_template = "<|pad|>" + ORIGINAL
    assert prompt_ids(tokenizer, "1+1?").count(tokenizer.pad_token_id) == 1


@pytest.mark.parametrize("opening", ["<|assistant|><think>", "<|assistant|>\n"])
def test_a_template_that_opens_otherwise_than_it_writes(
    tokenizer: PreTrainedTokenizerFast, opening: str
) -> None:
    tokenizer.chat_template = ORIGINAL.replace("%}<|assistant|>{%", f"%}}{opening}{{%")
    with pytest.raises(ValueError, match="opens an answer differently"):
        answered(tokenizer, TEXTS[0], TEXTS[1])


# ---------------------------------------------------------------- longer conversations


@pytest.mark.parametrize("template", [ORIGINAL, LLAMA], ids=["ours", "llama"])
def test_all_answers_are_learnt(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """And no question, nor what comes before the first."""
    tokenizer.chat_template = template
    document = conversed(tokenizer, "1+1?", "2", "And 2+2?", "4.", "Thanks!")
    assert learnt(tokenizer, document) == "2<|end|>|4.<|end|>"
    turns = (Turn("system", "Be brief."), Turn("user", "1+1?"), Turn("assistant", "2"))
    document = conversation_document(tokenizer, turns)
    assert learnt(tokenizer, document) == "2<|end|>"
    assert isinstance(document, Document)
    assert "Be brief." in str(tokenizer.decode(document.ids))


def test_a_line_break_after_an_answer_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    """With the end, as some templates have it."""
    tokenizer.chat_template = ORIGINAL.replace("<|end|>", "<|end|>\n")
    document = conversed(tokenizer, "1+1?", "2", "And 2+2?", "4")
    assert learnt(tokenizer, document) == "2<|end|>\n|4<|end|>\n"


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text("ab1 \né", min_size=1, max_size=6), min_size=2, max_size=6))
def test_each_prompt_is_what_a_model_is_asked_with(
    trained: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    """What is not learnt at the start is the prompt, token for token; and all is the rendering."""
    trained.chat_template = ORIGINAL
    document = conversed(trained, *texts)
    assert isinstance(document, Document)
    assert document.learn is not None
    asked = document.ids[: document.learn.index(True)]
    assert asked == prompt_ids(trained, texts[0])
    answers = [f"{text}<|end|>" for text in texts[1::2]]
    assert learnt(trained, document) == "|".join(answers)


# Some models reason before they answer, and their templates leave it out of all turns but the last.
FORGETFUL = ORIGINAL.replace(
    "{{ message.content }}",
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}",
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_rewritten_turns_are_a_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETFUL
    thought = "a</think>2"
    assert conversed(tokenizer, "1+1?", thought, "And 2+2?", "4") == REWRITTEN
    document = conversed(tokenizer, "1+1?", thought)
    assert learnt(tokenizer, document) == f"{thought}<|end|>"


def test_what_a_template_refuses_is_a_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = STRICT + ORIGINAL
    turns = (Turn("system", "x"), Turn("user", "1+1?"), Turn("assistant", "2"))
    assert conversation_document(tokenizer, turns) == REFUSED
    assert isinstance(conversation_document(tokenizer, turns[1:]), Document)


def test_a_token_of_prompt_and_answer_is_a_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    """It would be asked with one token and learnt with another."""
    merged = train_tokenizer(["apples apples apples"] * 3, 300)
    merged.chat_template = ORIGINAL.replace("%}<|assistant|>{%", "%}<|assistant|>app{%").replace(
        "{{ message.content }}",
        "{{ 'app' if message.role == 'assistant' }}{{ message.content }}",
    )
    assert conversed(merged, "1+1?", "les") == JOINED
    assert isinstance(conversed(merged, "1+1?", " two"), Document)


def test_conversations_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        conversed(tokenizer, "1+1?", "2", "And 2+2?", "4")


def test_a_text_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    document = text_document(tokenizer, TEXTS[0])
    assert tokenizer.decode(document.ids) == f"{TEXTS[0]}<|end|>"
    assert document.learn is None


# ---------------------------------------------------------------- mistakes


def test_tokenizers_must_be_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    check_same_tokenizer(tokenizer, train_tokenizer(TEXTS, 300), Path("models/student"))
    other = train_tokenizer(["something else altogether, and enough of it"], 280)
    with pytest.raises(ValueError, match=r"models/student: its tokenizer differs .* in \d+ of \d+"):
        check_same_tokenizer(tokenizer, other, Path("models/student"))


def test_a_longer_vocabulary_is_another(tokenizer: PreTrainedTokenizerFast) -> None:
    longer = train_tokenizer(TEXTS, 300)
    longer.add_tokens(["<|more|>"])
    with pytest.raises(ValueError, match="must share its teacher's tokenizer"):
        check_same_tokenizer(tokenizer, longer, Path("student"))


def lose_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def lose_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def damage_model(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"XYZ"'))


@pytest.mark.parametrize("damage", [lose_config, lose_vocabulary, damage_json, damage_model])
def test_unreadable_tokenizers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: Callable[[Path], None]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_shots_are_earlier_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(tokenizer, "2+2?", [("1+1?", "2"), ("1+2?", "3")])
    assert tokenizer.decode(ids) == (
        "<|user|>1+1?<|end|><|assistant|>2<|end|><|user|>1+2?<|end|><|assistant|>3<|end|>"
        "<|user|>2+2?<|end|><|assistant|>"
    )
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, "2+2?", [("1+1?", "2")])) == "1+1?\n2\n\n2+2?\n"
