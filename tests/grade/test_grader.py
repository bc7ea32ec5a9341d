"""Verdicts on many answers: the public sets, wrong answers, hostile ones, votes."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from benchmarks.grading import SETS, WORDINGS, golds_of, perturbed, read, rewritten

from retort.grade import Grader, Verdict, equivalent, vote_groups

SECONDS = 0.5  # for hostile answers; others have time enough on a busy machine too

HOSTILE = [
    "10^{10^{10}}",
    "10^{10^{10^{10}}}",
    "99999999!",
    "((10!)!)!",
    "(x+1)^{100000}",
    "(x+1)^{100000}-(x+1)^{99999}",
    "(" * 300 + "1" + ")" * 300,
    "{" * 300,
    r"\sqrt{" * 60 + "x" + "}" * 60,
    "9" * 20_000,
    "0." + "3" * 20_000,
    "1/" + "7" * 20_000,
    r"\frac{1}{",
    r"\frac{}{}\left(\begin{pmatrix}1&\\",
    r"\def\x{\x}\x",
    "5\0\0\0x",
    "\0",
    "x" * 3_000_000,
    "1+" * 1_000_000,
    r"\int_0^1 x^{x^{x}}dx",
    r"\sum_{n=1}^{10^{10}}\frac{1}{n!}",
    r"\lfloor 2^{10^{10}}\rfloor",
    r"\lim_{x\to0}\frac{\sin x}{x^{x}}",
    "\ud800\N{COMBINING ACUTE ACCENT}∑∫√",
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2) as grader:
        yield grader


def test_every_method(grader: Grader) -> None:
    texts = ["The final answer is 40,320.", r"\boxed{80640/2}", r"\boxed{8!}", "#### 7", "Hm."]
    assert grader.grade([("40320", text) for text in texts]) == [
        Verdict("40,320", "40320", True, "string"),
        Verdict("80640/2", "40320", True, "rational"),
        Verdict("8!", "8!", True, "symbolic"),
        Verdict("7", "7", False, "different"),
        Verdict(None, None, False, "no answer"),
    ]
    (late,) = grader.judge([("x", r"\lfloor 2^{10^{10}}\rfloor")])
    assert (late.correct, late.method) == (False, "timeout")


def test_hostile_answers_cost_their_limit_and_no_verdict() -> None:
    assert len(HOSTILE) == 24
    answers = [f"{i}x+1" for i in range(976)]
    for i, each in enumerate(HOSTILE):
        answers.insert(40 * i, each)
    begun = time.monotonic()
    with Grader(workers=2, timeout=SECONDS) as grader:
        verdicts = grader.grade([("1+3x", rf"\boxed{{{answer}}}") for answer in answers])
    seconds = time.monotonic() - begun
    methods = Counter(verdict.method for verdict in verdicts)
    assert len(verdicts) == 1000
    assert [v.answer for v in verdicts if v.correct] == ["3x+1"]
    assert methods["timeout"] <= len(HOSTILE)
    assert methods["different"] >= 975
    assert seconds < 24 * (SECONDS + 3)


def test_plain_answers_start_no_worker() -> None:
    grader = Grader()
    grader.judge([("5", "6"), ("5", "10/2"), ("x", "X"), ("even", "odd"), ("52_8", "52_9")])
    grader.judge([("6:00", "6:30"), ("5", "between 4 and 6 apples"), ("x", "9" * 500), ("5", None)])
    assert grader.vote_groups(["5", "10/2", "6", "even", None]) == [0, 0, 1, 2, None]
    assert grader.pool.pids == []


def test_a_comparison_is_made_once(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("3y+7", "7+3y"), ("3y+7", "$7 + 3y$")]
    assert [verdict.method for verdict in grader.judge(pairs)] == ["symbolic"] * 2
    monkeypatch.setattr(grader.pool, "ask", lambda requests: [1 / 0 for _ in requests])
    assert [verdict.method for verdict in grader.judge(pairs)] == ["symbolic"] * 2


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retort.grade.grader._CACHED", 3)
    with Grader(workers=1) as grader:
        for i in range(6):
            grader.remember("x", f"x+{i}", "different")
            assert grader.judge([(f"{i}+z", f"z+{i}")])[0].correct
        assert len(grader._methods) == 3


def test_threads_share_a_grader(grader: Grader) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda i: grader.equivalent(f"{i}a+b", f"b+{i}a"), range(12))
        assert list(found) == [True] * 12


def test_functions_without_a_grader() -> None:
    assert equivalent("8!", "40320")
    assert not equivalent("8!", "40321")
    assert not equivalent("", "")
    assert vote_groups(["x+1", None, "1+x", "2"]) == [0, None, 0, 1]


@pytest.mark.parametrize(
    ("answers", "groups"),
    [
        ([], []),
        (["8!", "40320", None, "40321"], [0, 0, None, 1]),
        ([r"2\sqrt{5}", "x", r"\sqrt{20}", "X", r"\boxed{x}"], [0, 1, 0, 2, 1]),
        (["(a+b)^2", "$", "a^2+2ab+b^2", "a^2+b^2"], [0, None, 0, 1]),
        (["52_8", "52", "51+1"], [0, 0, 0]),
        (["52_8", "52", "52_9"], [0, 1, 2]),
        (["x+y=1", "2x+2y=2", "x+y=2", "3x+3y=6"], [0, 0, 1, 1]),
        (["(1, 2)", r"\{1, 2\}", "1, 2"], [0, 1, 0]),
        ([r"\lfloor 2^{10^{10}}\rfloor", "x", "x"], [0, 1, 1]),
    ],
)
def test_vote_groups(grader: Grader, answers: list[str | None], groups: list[int | None]) -> None:
    assert grader.vote_groups(answers) == groups


# The public problem sets


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("wording", WORDINGS)
def test_gold_answers(data_folder: Path, grader: Grader, name: str, wording: str) -> None:
    golds = golds_of(data_folder / f"{name}.jsonl")
    verdicts = grader.grade([(gold, WORDINGS[wording](gold)) for gold in golds])
    assert [gold for gold, each in zip(golds, verdicts, strict=True) if not each.correct] == []
    assert len(golds) in (1319, 500, 4500)


def test_judged_pairs(data_folder: Path, grader: Grader) -> None:
    pairs = read(data_folder / "equivalence.jsonl")
    verdicts = grader.judge([(row["gold"], row["pred"]) for row in pairs])
    judged = zip(pairs, verdicts, strict=True)
    wrong = [row for row, verdict in judged if verdict.correct != row["equal"]]
    assert [row for row in wrong if not row["equal"]] == [], "called equal, and they are not"
    assert len(pairs) == 130
    assert len(wrong) <= 0.03 * len(pairs), wrong


@pytest.mark.parametrize(("name", "every"), [*zip(SETS, (1, 4, 40), strict=True)])
def test_perturbed_answers(data_folder: Path, grader: Grader, name: str, every: int) -> None:
    golds = golds_of(data_folder / f"{name}.jsonl")[::every]
    changed = [each for gold in golds for each in perturbed(gold)]
    verdicts = grader.judge([(each.gold, each.answer) for each in changed])
    accepted = [each for each, v in zip(changed, verdicts, strict=True) if v.correct]
    assert len(changed) > 300
    assert accepted == []


def test_rewritten_answers(data_folder: Path, grader: Grader) -> None:
    golds = golds_of(data_folder / "math_train4500.jsonl")[::15]
    changed = [each for gold in golds for each in rewritten(gold)]
    verdicts = grader.judge([(each.gold, each.answer) for each in changed])
    rejected = [each for each, v in zip(changed, verdicts, strict=True) if not v.correct]
    assert len(changed) > 50
    assert rejected == []
