"""What a recipe's sources hold: problems that are worked, and completions that were correct."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from retort.data import arithmetic
from retort.data.chat import Conversation, Turn
from retort.data.rows import Source
from retort.data.sources import open_source, source_name
from retort.recipe import Arithmetic, Chat, Gsm8k, Jsonl, Sampled, Text, Worked
from retort.store import Run


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(source: Source, indices: range) -> list[Any]:
    return [None if row is None else row.content for row in source.read(indices)]


def asked(question: str, answer: str) -> Conversation:
    return Turn("user", question), Turn("assistant", answer)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (Worked(kind="worked", problems=Arithmetic(kind="arithmetic")), "arithmetic"),
        (Worked(kind="worked", problems=Gsm8k(kind="gsm8k", split="train")), "gsm8k"),
        (Worked(kind="worked", problems=Jsonl(kind="jsonl", path="a/b.jsonl")), "a/b.jsonl"),
        (Text(kind="text", path="texts/*.parquet"), "texts/*.parquet"),
        (Text(kind="text", hub="some/texts"), "some/texts"),
        (Chat(kind="chat", hub="some/chats", subset="easy", messages="m"), "some/chats:easy"),
        (Sampled(kind="sampled", runs=("runs/a", "runs/b")), "runs/a, runs/b"),
    ],
)
def test_names(data: Any, name: str) -> None:
    assert source_name(data) == name


# ---------------------------------------------------------------- worked problems


def test_arithmetic_has_the_examples_of_its_split() -> None:
    spec = Arithmetic(kind="arithmetic", split="train", seed=3, difficulty=(1, 2))
    data = Worked(kind="worked", problems=spec, prompt="Q: {question}")
    source = open_source(data, seed=99)  # the problems have a seed of their own
    assert source.rows is None
    found = [content for content in contents(source, range(60)) if content is not None]
    wanted = islice(arithmetic.examples("train", 3, (1, 2)), len(found))
    assert 40 < len(found) < 60
    assert found == [asked(f"Q: {e.question}", e.solution) for e in wanted]


def test_worked_problems_from_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": i, "why": f"It is {i}."} for i in range(4)]
    spec = Jsonl(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows), solution="why")
    source = open_source(Worked(kind="worked", problems=spec, prompt="{question}"), seed=0)
    assert source.rows == 4
    for start in (0, 4):
        found = contents(source, range(start, start + 4))
        assert set(found) == {asked(f"{i}?", f"It is {i}.") for i in range(4)}


def test_problems_without_a_solution_cannot_be_learnt(tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "question": "?", "answer": 1} for i in range(3)]
    spec = Jsonl(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match=r"3 have none \(first: p0\); name its key with solution="):
        open_source(Worked(kind="worked", problems=spec), seed=0)


def test_a_text_file_has_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.")
    for path in (tmp_path / "a.txt", tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"a\.txt: a text file has no conversations"):
            open_source(Chat(kind="chat", path=path, messages="messages"), seed=0)


# ---------------------------------------------------------------- completions

Completions = Sequence[tuple[str, int, str, bool, str]]
"""Problem, sample, text, whether it is correct, and how it ended."""


def run_folder(folder: Path, completions: Completions, versions: Sequence[str] = ("1",)) -> Path:
    """A run of two problems, and verdicts of which only the last version knows what is correct."""
    run = Run.start(folder, {"prompt": "Q: {question}"}, {"name": "run"})
    with run.lock():
        run.problems.append(
            [{"problem_id": id, "question": f"{id}?", "answer": "1"} for id in ("p1", "p2")]
        )
        run.completions.append([completion(*each) for each in completions])
        for version in versions:
            sure = version == versions[-1]
            run.verdicts(version).append([verdict(*each, sure) for each in completions])
    return folder


def completion(id: str, sample: int, text: str, correct: bool, end: str) -> dict[str, Any]:
    numbers = dict.fromkeys(["seed", "token_count", "prompt_tokens", "batch"], 1)
    seconds = dict.fromkeys(["logprob", "started", "ended"], 0.0)
    row = {"problem_id": id, "sample_idx": sample, "text": text, "finish_reason": end}
    return row | numbers | seconds


def verdict(id: str, sample: int, text: str, correct: bool, end: str, sure: bool) -> dict[str, Any]:
    row = {"problem_id": id, "sample_idx": sample, "answer": "1", "group": "1", "method": "exact"}
    return row | {"correct": correct and sure}


MIXED: Completions = [
    ("p2", 0, "two", True, "stop"),
    ("p1", 3, "fourth", True, "stop"),
    ("p1", 1, "second", False, "stop"),
    ("p1", 0, "first", True, "stop"),
    ("p1", 2, "first", True, "stop"),  # the same again
    ("p1", 4, "fifth, and on and", True, "length"),
]


def listed(per_problem: int | None, *runs: Path) -> list[Conversation]:
    """All rows of the first pass, in an order that shuffling does not change."""
    source = open_source(Sampled(kind="sampled", runs=runs, per_problem=per_problem), seed=0)
    assert source.rows is not None
    return sorted(contents(source, range(source.rows)))


def test_correct_completions_once_each(tmp_path: Path) -> None:
    found = listed(None, run_folder(tmp_path / "a", MIXED))
    wanted = [("p1?", "first"), ("p1?", "fourth"), ("p2?", "two")]
    assert found == [asked(f"Q: {question}", answer) for question, answer in wanted]


def test_at_most_so_many_of_each_problem(tmp_path: Path) -> None:
    found = listed(1, run_folder(tmp_path / "a", MIXED))
    assert found == [asked("Q: p1?", "first"), asked("Q: p2?", "two")]


def test_several_runs_take_turns(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a", [("p1", i, f"a{i}", True, "stop") for i in range(3)])
    same = [("p1", i, text, True, "stop") for i, text in enumerate(("a0", "b1", "b2"))]
    second = run_folder(tmp_path / "b", same)
    assert [answer.text for _, answer in listed(3, first, second)] == ["a0", "a1", "b1"]


def test_the_order_is_not_that_of_the_parts(tmp_path: Path) -> None:
    """On another machine the same completions may have been finished in another order."""
    folders = [run_folder(tmp_path / "a", MIXED), run_folder(tmp_path / "b", MIXED[::-1])]
    first, second = (
        open_source(Sampled(kind="sampled", runs=(folder,)), seed=0) for folder in folders
    )
    assert contents(first, range(6)) == contents(second, range(6))


def test_the_newest_verdicts_count(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", MIXED, versions=("2", "9", "10"))
    assert len(listed(None, folder)) == 3


def test_runs_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        listed(None, tmp_path)
    with pytest.raises(ValueError, match=r"a: not graded; `retort grade .*a` does that"):
        listed(None, run_folder(tmp_path / "a", MIXED, versions=()))
    wrong = [(id, sample, text, False, end) for id, sample, text, _, end in MIXED]
    with pytest.raises(ValueError, match="b: no completion that is correct and ended by itself"):
        listed(None, run_folder(tmp_path / "b", wrong))
    Run.start(tmp_path / "c", {"model": "x"}, {"name": "c"}).verdicts("1").append(
        [verdict("p1", 0, "", True, "stop", True)]
    )
    with pytest.raises(ValueError, match=r"c: its run\.json has no prompt"):
        listed(None, tmp_path / "c")
