"""Finding and comparing answers, on planted cases, hostile text and the public problem sets."""

import itertools
import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from retort.grade import extract, grade_text, normalise, rational, vote_key
from retort.grade.answers import EQUAL, MAX_ANSWER, Form, Verdict, decide


def equal(gold: str, answer: str) -> bool:
    """As far as can be told without algebra."""
    return decide(Form.of(gold), Form.of(answer)) in EQUAL


BOXED = [
    (r"The final answer is $\boxed{42}$. I hope it is correct.", "42"),
    (r"So \boxed{1}. The final answer is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ("The final answer is 5.\n\nIn other words,\n\\boxed{7}\n", "7"),
    (r"\boxed{1} and then \boxed {2}", "2"),
    (r"\boxed{1} and then \boxed{2", "1"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"{ { \boxed{5} and }}}}", "5"),
    (r"\boxed{x^{2^{3}}} } {", "x^{2^{3}}"),
    (r"\boxed{1 + \boxed{2}}", "2"),
    (r"\boxed{a \\}", r"a \\"),
    (r"The final answer is $\boxed{10", r"\boxed{10"),
]
STATED = [
    ("The final answer is 42", "42"),
    ("the FINAL\nanswer  IS: 42.", "42"),
    ("The final answer is 3.5.", "3.5"),
    ("The final answer is .35625. I hope it is correct.", ".35625"),
    ("The final answer is 42.I hope it is correct.", "42"),
    ("The final answer is 6:00 p.m. I hope it is correct.", "6:00 p.m"),
    ("The final answer is **42**.", "42"),
    ("The final answer is: **42.**\nDone.", "42"),
    ("The final answer is $\\(10\\)$", "10"),
    ("The final answer is `5`.", "5"),
    ("The final answer is:\n\n\\[\n\\frac{1}{2}\n\\]\nDone.", r"\frac{1}{2}"),
    ("The final answer is\n$$\n5\n$$\nor so", "5"),
    ("The final answer is $18 per day.", "18 per day"),
    ("The final answer is $5$ or $6$.", "5$ or $6"),
    ("The final answer is 5. Wait! The final answer is 6.", "6"),
    ("The final answer is 5\nbecause of 7.", "5"),
    ("The final answer is \x0042\x00.", "42"),
    ("The final answer is 90\\text{ square\nunits}.", "90\\text{ square\nunits}"),
    (
        "The final answer is \\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}.\nDone.",
        "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
    ),
]
HASHED = [("#### 5", "5"), ("1 + 1 = 2\n#### 2,000\n", "2,000"), ("#### 1\n#### 2\nok", "2")]
FALLEN_BACK = [(r"\boxed{1}. The final answer is", "1"), ("#### 5\nThe final answer is .", "5")]


@pytest.mark.parametrize(("text", "answer"), BOXED + STATED + HASHED + FALLEN_BACK)
def test_answer_is_found(text: str, answer: str) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot tell.",
        "The final answer is",
        "The final answer is **.**",
        "The final answer is $$ $$",
        r"The final answer is \boxed{}.",
        r"\boxed{ $ $ }",
        r"\boxed{5",
        "####",
        "The final answer isn't 5",
        "final answers is 5",
        "The final answer is " + "so long " * MAX_ANSWER,
    ],
)
def test_no_answer_is_found(text: str) -> None:
    assert extract(text) is None


PIECES = [
    *" {}9a.,$\\\n\0-^_½×~%",
    r"\boxed{",
    r"\boxed",
    r"\boxed{}",
    r"\frac{",
    r"\text{",
    r"\begin{",
    "final answer is ",
    "final ",
    "####",
    "1,111",
    "111 ",
    "1/",
    "1.",
    "one ",
    "and ",
    "x=",
    "since ",
    "thousand ",
    r"\ ",
]


@pytest.mark.parametrize("start", ["", "The final answer is ", r"\boxed{", "5 "])
def test_time_is_linear_on_hostile_text(start: str) -> None:
    for piece in PIECES:
        text = start + piece * (30_000 // len(piece)) + "}"
        begun = time.process_time()
        extract(text)
        normalise(text)
        # linear work takes less than half a second, quadratic work many
        assert time.process_time() - begun < 3, piece


WRITTEN_THE_SAME = [
    ("70000", r"$\$70{,}000$"),
    ("70000", "70 000"),
    ("70000", r"70\,000"),
    ("10080", r"10,\!080"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("18", "18 dollars"),
    ("18", "+18"),
    ("18", "= 18"),
    ("18", "**18**."),
    ("18", "[18 dollars]"),
    ("18", "£18"),
    ("18", "18 USD"),
    ("-5", "-$5"),
    ("-5", "(\N{MINUS SIGN}5)"),
    ("5", "5cm"),
    ("5", "5 cm^2"),
    ("5", "5 cm²"),
    ("5", r"5\text{ m}"),
    ("5", r"5\ \mathrm{kg}"),
    ("15", r"15\mbox{ cm}^2"),
    (r"\sqrt{51}", r"\sqrt{51}\text{ units}"),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{5}{9}", r"\frac 59"),
    (r"\frac{9}{19}", r"\frac9{19}"),
    (r"\frac{\pi}{2}", "π/2"),
    (r"\frac{2\pi}{3}", "2π/3"),
    (r"2^{\frac{1}{2}}", "2^{1/2}"),
    (r"\sqrt{5}", r"\sqrt 5"),
    (r"11\sqrt{2}", r"11\sqrt2"),
    ("x^{10}", "x^10"),
    ("54", r"54^{\circ}"),
    ("54", "54°"),
    ("10", "10 percent"),
    ("10", r"10\%"),
    ("5", "x = 5"),
    ("[-2, 7]", r"x \in [-2,7]"),
    ("5", "The answer is 5"),
    ("5", "5, since 2+3=5"),
    ("24", "24 hours = 1 day"),
    ("6:00", "6:00 p.m."),
    ("1, -2", "1 and -2"),
    ("19, 46, 82", r"19, 46, \text{ and } 82"),
    ("(3, 4]", r"\left(3,4\right]"),
    ("(1, 2)", "(1.0, 2.00)"),
    (r"(2, \infty)", "(2,+∞)"),
    ("52_{8}", "52_8"),
    ("52_{8}", r"52_{\text{eight}}"),
    ("105", "one hundred and five"),
    ("-3", "minus three"),
    ("2500", "2.5 thousand"),
    ("yes", r"\text{Yes}"),
    ("C", r"\text{(C)}"),
    ("C", "c"),
    ("10", r"\boxed{10"),
    ("5", "５"),
    ("", " $ . $ "),
]


@pytest.mark.parametrize(("notation", "answer"), WRITTEN_THE_SAME)
def test_normal_notation(notation: str, answer: str) -> None:
    assert normalise(answer) == notation


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18", Fraction(18)),
        ("-1,234.50", Fraction(-2469, 2)),
        (".35625", Fraction(57, 160)),
        ("1.5e3", Fraction(1500)),
        ("1.5E-3 grams", Fraction(3, 2000)),
        (r"1.5 \times 10^{3}", Fraction(1500)),
        ("1.5 × 10^-3", Fraction(3, 2000)),
        ("2^{10}", Fraction(1024)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{1}{-2}", Fraction(-1, 2)),
        (r"\frac{0.5}{2}", Fraction(1, 4)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("-137 1/2 miles", Fraction(-275, 2)),
        ("1½", Fraction(3, 2)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-0.10\overline{6}", Fraction(-8, 75)),
        (r"12.5\%", Fraction(25, 2)),
        ("twenty-one", Fraction(21)),
        ("three hundred thousand and two apples", Fraction(300002)),
        ("9" * MAX_ANSWER, Fraction(10**MAX_ANSWER - 1)),
    ],
)
def test_value_is_exact(answer: str, value: Fraction) -> None:
    assert rational(answer) == value


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "-",
        ".",
        "1/0",
        r"\frac{1}{0}",
        "0^0",
        "0^{-1}",
        "10**10**10",
        "9^{9^{9}}",
        "9^9^9",
        "10^{9999}",
        "1e9999",
        "1e-999999999",
        "9" * 20_000,
        "1/" + "9" * 20_000,
        "99999999!",
        "1" + "\N{COMBINING OVERLINE}",
        r"1\frac{5}{4}",
        "3/4/2020",
        "1.2.3",
        "12:30",
        "3, 5",
        "(1,234)",
        "3-4",
        "3 or 4",
        "2k",
        "2 ab",
        "52_8",
        "one two three",
        "three thirds",
        "two dozen",
        "infinity",
        "nan",
        "0x10",
        "1_000",
    ],
)
def test_what_is_no_number_has_no_value(answer: str) -> None:
    begun = time.process_time()
    assert rational(answer) is None
    assert vote_key(answer) != "0"
    assert time.process_time() - begun < 1


DIFFERENT = [
    (r"\frac{1}{3}", "0.333333"),
    ("0.33", r"\frac{1}{3}"),
    ("2", "2.001"),
    ("52_8", "52_9"),
    ("2516_8", r"2516_{10}"),
    ("3", "3 or 4"),
    ("7", "between 6 and 8"),
    ("12", "12 or 13 depending on the reading"),
    ("4", "1,2,3,4"),
    ("5", "about 5"),
    ("5", "5 squared"),
    ("2", "2k"),
    ("5", "5i"),
    ("5", "5x dollars"),
    ("288", r"288\pi"),
    ("3R^2", "3r^2"),
    ("x", "X"),
    ("0", "10^{-7}"),
    ("0", "10^{-999}"),
    ("1/2^{99}", "1/2^{98}"),
    (r"1\frac{4}{5}", r"\frac{4}{5}"),
    ("(6,31,-1)", "(6,31)"),
    ("(3,4]", "(3,4)"),
    ("1234", "(1,234)"),
    ("6:00", "6:30"),
    ("0.5", "50%"),
    ("", ""),
    ("0", ""),
    ("$", "%"),
]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_differ(gold: str, answer: str) -> None:
    assert not equal(gold, answer)
    assert not equal(answer, gold)


def test_numeral_without_its_base_is_the_numeral_asked_for() -> None:
    assert equal("52_8", "52")
    assert equal("52", "52_8")
    assert len({vote_key("52"), vote_key("52_8"), vote_key("52_9")}) == 3


def test_vote_keys() -> None:
    assert vote_key(None) is None
    assert vote_key(" $ ") is None
    assert vote_key("2/4") == vote_key(r"\frac{1}{2}") == vote_key("0.50") == "1/2"
    assert vote_key("3.0 apples") == "3"
    assert vote_key(r"2 \sqrt 5") == vote_key(r"2\sqrt{5}") == r"2\sqrt{5}"


POOL = sorted({answer for pair in WRITTEN_THE_SAME + DIFFERENT for answer in pair})


@pytest.mark.parametrize("answer", POOL)
def test_normal_notation_stays(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(answer)


def test_equal_keys_are_equal_answers() -> None:
    for one, other in itertools.combinations_with_replacement(POOL, 2):
        same_key = vote_key(one) is not None and vote_key(one) == vote_key(other)
        assert equal(one, other) == equal(other, one)
        if "_" not in one + other:  # numerals with and without a base
            assert equal(one, other) == same_key, (one, other)
        assert equal(one, other) or not same_key


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("70,000", "The final answer is $70000.", Verdict("70000", "70000", True, "string")),
        ("0.5", r"\boxed{\frac{2}{4}}", Verdict(r"\frac{2}{4}", "1/2", True, "rational")),
        ("3", "#### 4 apples", Verdict("4 apples", "4", False, "different")),
        ("3", "Hm.", Verdict(None, None, False, "no answer")),
        ("3", r"\boxed{\%}", Verdict(None, None, False, "no answer")),
        ("", "The final answer is 5", Verdict("5", "5", False, "different")),
    ],
)
def test_verdicts(gold: str, text: str, verdict: Verdict) -> None:
    assert grade_text(gold, text) == verdict


# The public problem sets

WORDINGS: list[Callable[[str], str]] = [
    "Take 3. The final answer is {}.".format,
    "The final answer is ${}$. I hope it is correct.".format,
    r"The final answer is $\boxed{{{}}}$.".format,
    "The final answer is: **{}**\n".format,
    "So we get\n\\[ \\boxed{{{}}} \\]\n".format,
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k_gold(row: dict[str, Any]) -> str:
    return str(row["answer"]).split("####")[1].strip()


def test_gsm8k_solutions(data_folder: Path) -> None:
    problems = rows(data_folder / "gsm8k_test.jsonl")
    assert len(problems) == 1319
    for row in problems:
        assert grade_text(gsm8k_gold(row), row["answer"]).method == "string", row["answer"]


@pytest.mark.parametrize("wording", [*WORDINGS, "The final answer is ${} per day.".format])
def test_gsm8k_answers(data_folder: Path, wording: Callable[[str], str]) -> None:
    golds = [gsm8k_gold(row) for row in rows(data_folder / "gsm8k_test.jsonl")]
    assert [gold for gold in golds if not grade_text(gold, wording(gold)).correct] == []
    wrong = [str(int(gold.replace(",", "")) + 1) for gold in golds]
    pairs = zip(golds, wrong, strict=True)
    assert [gold for gold, other in pairs if grade_text(gold, wording(other)).correct] == []


@pytest.mark.parametrize("name", ["math500_test.jsonl", "math_train4500.jsonl"])
def test_math_answers(data_folder: Path, name: str) -> None:
    for gold in (row["answer"] for row in rows(data_folder / name)):
        for wording in WORDINGS:
            assert grade_text(gold, wording(gold)).correct, wording(gold)


def test_math500_solutions(data_folder: Path) -> None:
    problems = rows(data_folder / "math500_test.jsonl")
    verdicts = [grade_text(row["answer"], row["solution"]) for row in problems]
    assert sum(verdict.correct for verdict in verdicts) == len(problems) == 500
