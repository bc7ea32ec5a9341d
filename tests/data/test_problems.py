"""Problems from every source, subsets that grow, and what is wrong with a file."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.data import problems
from retort.data.problems import Problem
from retort.recipe import Arithmetic, Gsm8k, Jsonl, Math500


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(path: Path, count: int) -> Jsonl:
    rows = [{"id": f"p{i}", "question": f"{i}?", "answer": i} for i in range(count)]
    return Jsonl(kind="jsonl", path=jsonl(path, rows))


# ---------------------------------------------------------------- procedural


def test_arithmetic_problems_are_distinct_and_worked() -> None:
    spec = Arithmetic(kind="arithmetic", count=200, difficulty=(1, 3))
    found = problems.load(spec)
    assert len({problem.id for problem in found}) == 200
    assert len({problem.question for problem in found}) == 200
    assert all(p.solution and p.solution.endswith(f" {p.answer}.") for p in found)
    assert problems.load(spec) == found


def test_arithmetic_subsets_grow() -> None:
    small, large = (
        problems.load(Arithmetic(kind="arithmetic", count=count, difficulty=(2, 2)))
        for count in (30, 60)
    )
    assert large[:30] == small


def test_arithmetic_splits_share_nothing() -> None:
    train, test = (
        problems.load(Arithmetic(kind="arithmetic", split=split, count=300, difficulty=(1, 1)))
        for split in ("train", "test")
    )
    assert {p.id for p in train}.isdisjoint(p.id for p in test)


# ---------------------------------------------------------------- files


def test_gsm8k_rows(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "Two and two.\n2+2=<<2+2=4>>4\n#### 1,234"}]
    (found,) = problems.load(Gsm8k(kind="gsm8k", path=jsonl(tmp_path / "a.jsonl", rows)))
    assert found.question == "How many?"
    assert found.answer == "1,234"
    assert found.solution == rows[0]["answer"]


def test_math500_rows(tmp_path: Path) -> None:
    row = {"problem": "$x$?", "solution": "So $x = 1$.", "answer": "1", "unique_id": "test/1.json"}
    (found,) = problems.load(Math500(kind="math500", path=jsonl(tmp_path / "a.jsonl", [row])))
    assert found == Problem("test/1.json", "$x$?", "1", "So $x = 1$.")


def test_jsonl_rows_under_other_keys(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "a": 2, "why": "By counting.", "id": 7}])
    spec = Jsonl(kind="jsonl", path=path, question="q", answer="a", solution="why")
    assert problems.load(spec) == [Problem("7", "1+1?", "2", "By counting.")]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "é?", "answer": 0}\n\n  \n', encoding="utf-8")
    (found,) = problems.load(Jsonl(kind="jsonl", path=path))
    assert (found.question, found.answer) == ("é?", "0")


def test_ids_without_ids_are_those_of_the_text(tmp_path: Path) -> None:
    """The same question has the same id in another file, at another place."""
    rows = [{"question": f"{i}?", "answer": i} for i in range(5)]
    first = problems.load(Jsonl(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows)))
    again = problems.load(Jsonl(kind="jsonl", path=jsonl(tmp_path / "b.jsonl", rows[::-1])))
    assert {p.id: p for p in first} == {p.id: p for p in again}
    assert len({p.id for p in first}) == 5


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.sampled_from(["a", "a-2", "a-3", "a-2-2", "b"]), min_size=1, max_size=9))
def test_repeated_ids_become_distinct(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str]
) -> None:
    path = tmp_path_factory.mktemp("ids") / "a.jsonl"
    rows = [{"id": id, "question": f"{i}?", "answer": i} for i, id in enumerate(ids)]
    found = problems.load(Jsonl(kind="jsonl", path=jsonl(path, rows)))
    assert len({problem.id for problem in found}) == len(ids)
    assert [problem.answer for problem in found] == [str(i) for i in range(len(ids))]
    firsts = {id: ids.index(id) for id in ids}
    if set(ids) == {"a"}:
        assert [p.id for p in found] == ["a", *(f"a-{n}" for n in range(2, len(ids) + 1))]
    assert found[0].id == ids[0]
    assert all(found[place].id.startswith(id) for id, place in firsts.items())


# ---------------------------------------------------------------- subsets


def test_a_larger_count_only_adds_problems(tmp_path: Path) -> None:
    spec = numbered(tmp_path / "a.jsonl", 20)
    subsets = [problems.load(spec.model_copy(update={"count": n, "seed": 3})) for n in range(1, 21)]
    for small, large in pairwise(subsets):
        assert large[: len(small)] == small
    assert len(subsets[-1]) == 20
    whole = problems.load(spec)
    assert [problem.id for problem in whole] == [f"p{i}" for i in range(20)]
    assert subsets[-1] != whole
    assert sorted(subsets[-1], key=whole.index) == whole


def test_the_seed_draws_the_subset(tmp_path: Path) -> None:
    spec = numbered(tmp_path / "a.jsonl", 50).model_copy(update={"count": 10})
    drawn = [problems.load(spec.model_copy(update={"seed": seed})) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_count_beyond_the_file(tmp_path: Path) -> None:
    spec = numbered(tmp_path / "a.jsonl", 3).model_copy(update={"count": 4})
    with pytest.raises(ValueError, match="count = 4: there are only 3 problems"):
        problems.load(spec)


# ---------------------------------------------------------------- mistakes


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        problems.load(Jsonl(kind="jsonl", path=path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl").startswith(f"{tmp_path}/no.jsonl: no such file")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no such file")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert refusal(path) == f"{path}: no problems in it"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"question": "?", "answer": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "a JSON object was expected"),
        (b'{"question": "?"}', "no 'answer' in this row (it has: question)"),
        (b'{"question": "?", "answer": null}', "no 'answer' in this row"),
        (b'{"question": "?", "answer": "  "}', "no 'answer' in this row"),
        (b'{"answer": 1, "prompt": "?"}', "no 'question' in this row (it has: answer, prompt)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "?", "answer": 1}\n\n' + line + b"\n")
    assert refusal(path).startswith(f"{path}:3: {message}")


def test_gsm8k_without_the_mark(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": "four"}])
    with pytest.raises(ValueError, match=r"a.jsonl:1: the answer of a GSM8K row ends in '####"):
        problems.load(Gsm8k(kind="gsm8k", path=path))


# ---------------------------------------------------------------- public sets


def test_public_gsm8k(data_folder: Path) -> None:
    found = problems.load(Gsm8k(kind="gsm8k", path=data_folder / "gsm8k_test.jsonl"))
    assert len(found) == 1319
    assert found[0].question.startswith("Janet")
    assert found[0].answer == "18"
    assert all(p.answer.replace(",", "").lstrip("-").isdecimal() for p in found)


def test_public_math500(data_folder: Path) -> None:
    path = data_folder / "math500_test.jsonl"
    found = problems.load(Math500(kind="math500", path=path))
    assert len({p.id for p in found}) == 500
    assert all(p.solution and "\\boxed" in p.solution for p in found)
    as_jsonl = Jsonl(kind="jsonl", path=path, question="problem", solution="solution", count=128)
    questions = {p.question for p in found}
    assert questions.issuperset(p.question for p in problems.load(as_jsonl))


# ---------------------------------------------------------------- shots

SHOTS = [
    {"question": "2+3?", "answer": "2+3=<<2+3=5>>5, so five.\n#### 5"},
    {"question": "2+4?", "answer": "The final answer is 6.\n#### 6"},
]


def test_shots_end_as_the_prompt_asks(tmp_path: Path) -> None:
    spec = Gsm8k(kind="gsm8k", path=jsonl(tmp_path / "a.jsonl", SHOTS))
    shown = problems.shots(spec, [Problem("a", "1+1?", "2")])
    assert [problems.worked(each) for each in shown] == [
        "2+3=5, so five.\nThe final answer is 5",
        "The final answer is 6.",
    ]


def test_a_shot_that_is_asked_is_refused(tmp_path: Path) -> None:
    spec = Gsm8k(kind="gsm8k", path=jsonl(tmp_path / "a.jsonl", SHOTS))
    with pytest.raises(ValueError, match=r"shots: problem \w+ is also asked"):
        problems.shots(spec, [Problem("a", "2+4?", "6")])


def test_a_shot_without_a_solution_is_refused(tmp_path: Path) -> None:
    spec = Jsonl(
        kind="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"question": "2+3?", "answer": "5"}])
    )
    with pytest.raises(ValueError, match="has no worked solution"):
        problems.shots(spec, [])
