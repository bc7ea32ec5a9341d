"""Which texts repeat an evaluation problem, and what of the public training sets does."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.data import problems
from retort.data.decontamination import Known, Match, words_of
from retort.data.problems import Problem
from retort.recipe import Gsm8k, Math500

LONG = "Ada has 12 apples, and Ben has 3 times as many. How many apples does Ben have now?"
SHORT = "What is $7 \\cdot 8$?"
SOLUTION = "Ben has three times as many apples as Ada, so he has 3 * 12 = 36."


@pytest.fixture
def known() -> Known:
    return Known([Problem("long", LONG, "36", SOLUTION), Problem("short", SHORT, "56")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  What's 3,000 ×\n25x?", ["what", "s", "3", "000", "25", "x"]),
        ("7\\cdot8=\\frac{x_1}{2}", ["7", "cdot", "8", "frac", "x", "1", "2"]),
        ("Ｆｕｌｌ ﬁt STRASSE straße", ["full", "fit", "strasse", "strasse"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        f"Problem: {LONG} The final answer is 36.",
        LONG.upper().replace(",", "").replace(" ", "\n\n"),
        "ada has 12 apples and ben has 3 times as many how many",  # 13 of its words
    ],
)
def test_long_questions_are_found_by_their_words(known: Known, text: str) -> None:
    found = known.match(text)
    assert found == Match(
        "long",
        "13 words of the question",
        "ada has 12 apples and ben has 3 times as many how many",
    )


def test_every_13_words_of_a_question_are_looked_for(known: Known) -> None:
    words = words_of(LONG)
    for start in range(len(words) - 12):
        text = " ".join(words[start : start + 13])
        assert known.match(text) == Match("long", "13 words of the question", text)


@pytest.mark.parametrize("text", [SHORT, "Tell me: what is 7 cdot 8?", "What is 7\\cdot8"])
def test_short_questions_are_found_whole(known: Known, text: str) -> None:
    assert known.match(text) == Match("short", "question", "what is 7 cdot 8")


def test_solutions_are_found_by_their_words(known: Known) -> None:
    text = f"I know it. {SOLUTION}"
    words = "ben has three times as many apples as ada so he has 3"
    assert known.match(text) == Match("long", "13 words of the solution", words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ada has 12 apples, and Ben has 3 times as many. How old is she?",  # 12 words in a row
        "What is 7 cdot 9?",
        "What is the 7 cdot 8?",
        "is 7 cdot 8",
        "Ben has three times as many apples as Ada, so he has",
    ],
)
def test_what_is_like_a_problem_is_none(known: Known, text: str) -> None:
    assert known.match(text) is None


def test_no_words_match_nothing() -> None:
    assert Known([Problem("empty", "?!", "1")]).match("?! a b") is None


def shares_words(question: str, text: str) -> bool:
    """The same, slowly."""
    asked, words = words_of(question), words_of(text)
    n = min(13, len(asked))
    parts = [asked[i : i + n] for i in range(len(asked) - n + 1)]
    return any(words[i : i + n] in parts for i in range(len(words) - n + 1))


@settings(max_examples=200, deadline=None)
@given(
    question=st.lists(st.sampled_from("abc"), min_size=1, max_size=16),
    text=st.lists(st.sampled_from("abcd"), max_size=40),
    at=st.integers(0, 40),
    part=st.slices(16),
)
def test_found_where_a_plain_search_finds_it(
    question: list[str], text: list[str], at: int, part: slice
) -> None:
    text = [*text[:at], *question[part], *text[at:]]
    known = Known([Problem("p", " ".join(question), "1")])
    found = known.match(" ".join(text))
    assert (found is not None) == shares_words(" ".join(question), " ".join(text))
    if found is not None:
        assert f" {found.text} " in f" {' '.join(text)} "


# ---------------------------------------------------------------- the public sets


def dropped(known: Known, path: Path, keys: tuple[str, str]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    with path.open() as lines:
        for row in map(json.loads, lines):
            found = known.match(row[keys[0]]) or known.match(row[keys[1]])
            kinds[found.kind if found else "kept"] += 1
    return kinds


def test_gsm8k_has_hardly_any_test_question_in_training(data_folder: Path) -> None:
    spec = Gsm8k(kind="gsm8k", path=data_folder / "gsm8k_test.jsonl")
    known = Known(problems.load(spec))
    found = dropped(known, data_folder / "gsm8k_train.jsonl", ("question", "answer"))
    parts = {"13 words of the question": 4, "13 words of the solution": 6}
    assert found == parts | {"kept": 7473 - 10}


def test_math_repeats_itself(data_folder: Path) -> None:
    spec = Math500(kind="math500", path=data_folder / "math500_test.jsonl")
    known = Known(problems.load(spec))
    found = dropped(known, data_folder / "math_train4500.jsonl", ("problem", "solution"))
    parts = {"13 words of the question": 118, "13 words of the solution": 84}
    assert found == parts | {"kept": 4500 - 202}


def test_every_test_question_finds_itself(data_folder: Path) -> None:
    asked = problems.load(Gsm8k(kind="gsm8k", path=data_folder / "gsm8k_test.jsonl"))
    asked += problems.load(Math500(kind="math500", path=data_folder / "math500_test.jsonl"))
    known = Known(asked)
    assert all(known.match(f"Problem: {problem.question}\nThink.") for problem in asked)
