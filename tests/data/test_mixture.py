"""From a recipe's data to training rows: shares, names, and what becomes of bad data."""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from retort.data import mixture as mixing
from retort.data.chat import train_tokenizer
from retort.data.mixture import OpenData, open_data
from retort.data.packing import Rows, check
from retort.data.problems import Problem
from retort.recipe import Arithmetic, Chat, Mixture, Part, Text, Worked


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Ada has 12 apples and Ben 30: that is 42."], 300)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, *values: Any) -> Text:
    return Text(kind="text", path=jsonl(path, [{"text": value} for value in values]))


def mixture(*parts: tuple[float, Any]) -> Mixture:
    return Mixture(kind="mixture", parts=[Part(weight=w, data=data) for w, data in parts])


def learnt(data: OpenData, batches: int, length: int = 32) -> tuple[str, Rows]:
    """All that rows hold, as text, and the rows."""
    rows = Rows(data, 1, length, range(1))
    found = [rows.batch() for _ in range(batches)]
    assert data.tokenizer is not None
    ids = [i for batch in found for i in batch.ids_BT[batch.document_BT >= 0].tolist()]
    return str(data.tokenizer.decode(ids)), rows


def ended(found: str) -> set[str]:
    """The documents, or turns of one, of which the end has been reached."""
    return set(found.split("<|end|>")[:-1])


# ---------------------------------------------------------------- mixtures


def test_shares_are_those_of_the_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = mixture(
        (3, texts(tmp_path / "a.jsonl", "aaa", "aaaa aa")),
        (1, texts(tmp_path / "b.jsonl", "b " * 25)),
        (0, Text(kind="text", path=tmp_path / "absent.jsonl")),  # not even opened
    )
    opened = open_data(data, tokenizer, 0)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert opened.shares == {names[0]: 0.75, names[1]: 0.25}
    found, rows = learnt(opened, 100)
    assert sum(rows.tokens.values()) == len(tokenizer.encode(found))
    assert rows.tokens[names[0]] / sum(rows.tokens.values()) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (float("inf"), 1), (float("nan"), 1)])
def test_weights_that_are_no_shares(weights: tuple[float, float]) -> None:
    data = Text(kind="text", path="a.jsonl")
    with pytest.raises(ValueError, match=r"all weights are 0|greater than or equal|finite"):
        mixture(*((weight, data) for weight in weights))


def test_the_same_place_twice_has_two_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    one = texts(tmp_path / "a.jsonl", "aaa")
    opened = open_data(mixture((1, one), (1, one), (2, one)), tokenizer, 0)
    path = str(tmp_path / "a.jsonl")
    assert list(opened.sources) == [path, f"{path} (2)", f"{path} (3)"]


def test_conversations_and_texts_in_one_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = jsonl(tmp_path / "b.jsonl", [{"turns": [turn("user", "q"), turn("assistant", "a")]}])
    chat = Chat(kind="chat", path=path, messages="turns")
    found, _ = learnt(
        open_data(mixture((1, texts(tmp_path / "a.jsonl", "txt")), (1, chat)), tokenizer, 0), 3
    )
    assert "txt<|end|>" in found
    assert "<|user|>q<|end|><|assistant|>a<|end|>" in found


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_texts_for_a_tokenizer_have_the_shares(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", *["aaaa"] * 30), texts(tmp_path / "b.jsonl", *["bb"] * 90)
    found = "".join(open_data(mixture((1, a), (1, b)), None, 0).texts())
    assert found.count("a") == 120  # all of the source that ends first
    assert abs(found.count("b") - 120) <= 4


def test_texts_of_conversations_are_their_turns() -> None:
    spec = Arithmetic(kind="arithmetic", split="train", difficulty=(1, 1))
    opened = open_data(Worked(kind="worked", problems=spec, prompt="Q: {question}"), None, 0)
    question, solution = islice(opened.texts(), 2)
    assert question.startswith("Q: ")
    assert "The final answer is" in solution


# ---------------------------------------------------------------- evaluation problems


def test_rows_that_repeat_a_problem_are_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"turns": [turn("user", "Solve: what is 7 * 8?"), turn("assistant", "56")]}
    good = {"turns": [turn("user", "what is 7 * 9?"), turn("assistant", "63")]}
    path = jsonl(tmp_path / "a.jsonl", [row, good])
    chat = Chat(kind="chat", path=path, messages="turns")
    opened = open_data(chat, tokenizer, 0, against=[Problem("p1", "What is 7 * 8?", "56")])
    found, rows = learnt(opened, 4)
    assert "63" in found
    assert "56" not in found
    dropped = rows.dropped()
    assert {(each.place, each.problem_id, each.kind, each.text) for each in dropped} == {
        (f"{path}:1", "p1", "question", "what is 7 8")
    }
    assert rows.skipped == {"repeats an evaluation problem": len(dropped)}


# ---------------------------------------------------------------- bad data


def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.jsonl"
    digits = b'{"text": "good", "id": ' + b"9" * 5000 + b"}"
    bad = [b'{"text": null}', b'{"text": 3}', b"{", b'{"text": "\xff"}', digits, b""]
    lines = [b'{"text": "good"}', *bad]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found, rows = learnt(open_data(Text(kind="text", path=path), tokenizer, 0), 20)
    assert ended(found) == {"good"}
    skipped = rows.skipped
    assert skipped.keys() == {"empty", "wrong type", "not valid JSON", "not valid UTF-8"}
    passes = rows.tokens[str(path)] / len(tokenizer.encode("good<|end|>"))
    counts = skipped | {"not valid JSON": skipped["not valid JSON"] / 2}
    assert all(abs(count - passes) <= 8 for count in counts.values())


def test_bad_rows_of_a_parquet_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.parquet"
    good = [turn("user", "q"), turn("assistant", "good")]
    other = [turn("user", "q"), turn("function", "call"), turn("assistant", "no")]
    pq.write_table(pa.table({"turns": [good, None, other, good[:1], []]}), path)
    chat = Chat(kind="chat", path=path, messages="turns")
    found, rows = learnt(open_data(chat, tokenizer, 0), 10)
    assert ended(found) == {"<|user|>q", "<|assistant|>good"}
    assert rows.skipped.keys() == {
        "empty",
        "a role that is not system, user or assistant",
        "no turn of the assistant",
    }


def test_a_document_of_ten_million_tokens_is_skipped_without_reading_it_token_by_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = texts(tmp_path / "a.jsonl", "one " * 10_000_000, "two")
    began = time.perf_counter()
    found, rows = learnt(open_data(data, tokenizer, 0), 5)
    assert ended(found) == {"two"}
    assert rows.skipped["too long"] > 0
    assert time.perf_counter() - began < 20


def test_long_texts_are_cut_and_long_conversations_skipped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = "no " * 50
    path = jsonl(tmp_path / "b.jsonl", [{"q": "q", "a": answer}, {"q": "q", "a": "short"}])
    chat = Chat(kind="chat", path=path, question="q", answer="a")
    data = mixture((1, texts(tmp_path / "a.jsonl", "text " * 50)), (1, chat))
    found, rows = learnt(open_data(data, tokenizer, 0), 40)
    assert "text " * 20 in found
    assert "short" in found
    assert "no no" not in found
    assert rows.skipped.keys() == {"too long"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "empty"),
        ({"text": 3}, "wrong type"),
        ({"text": "a" * 101}, "too long"),
    ],
)
def test_nothing_of_use_is_one_message(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(mixing, "LONGEST", 100)
    path = jsonl(tmp_path / "a.jsonl", [row] * 3)
    opened = open_data(Text(kind="text", path=path), tokenizer, 0)
    with pytest.raises(ValueError, match=rf"a\.jsonl: 1000 rows .*a\.jsonl:\d: {reason}") as caught:
        check(opened, 32)
    assert "\n" not in str(caught.value)


def test_the_split_of_the_problems_matters_not(tokenizer: PreTrainedTokenizerFast) -> None:
    """Nine of ten procedural problems belong to the other split, which is no fault."""
    spec = Arithmetic(kind="arithmetic", split="test", difficulty=(1, 1))
    data = Worked(kind="worked", problems=spec, prompt="{question}")
    _, rows = learnt(open_data(data, tokenizer, 0), 3, length=400)
    assert rows.skipped == {}
