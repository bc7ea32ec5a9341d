"""How far the grader agrees with public answers, what it makes of wrong ones, and its speed.

    python benchmarks/grading.py DATA benchmarks/results/grading.json [--workers 2]

DATA has gsm8k_test.jsonl, math500_test.jsonl, math_train4500.jsonl (problems with answers) and
equivalence.jsonl (judged pairs: gold, pred, equal); what is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.table import Table

from retort import __version__, console
from retort.grade import Grader, normalise, rational

WORDINGS: dict[str, Callable[[str], str]] = {
    "bare": "Take 3. The final answer is {}.".format,
    "$X$": "The final answer is ${}$. I hope it is correct.".format,
    "boxed": r"So \[ \boxed{{{}}} \]".format,
}
SETS = ("gsm8k_test", "math500_test", "math_train4500")

_WORD = re.compile(r"(?<![A-Za-z\\{])[A-Za-z]{4}|^[A-Z](?:, [A-Z])*$|[a-z] [a-z]")
_PAIR = re.compile(r"([(\[])([^,]*), ([^,]*)([)\]])")
_LIST = re.compile(r"[^()\[\]{}=]*(?:, [^()\[\]{}=]*)+")


Pair = tuple[str, str]
Trial = tuple[str, list[Pair], list[bool]]


@dataclass(frozen=True)
class Changed:
    """An answer made from a gold answer: `how`, and the result."""

    gold: str
    how: str
    answer: str


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def golds_of(path: Path) -> list[str]:
    """The gold answers of a problem set; those of GSM8K stand behind ####."""
    return [str(row["answer"]).rpartition("####")[2].strip() for row in read(path)]


# Wrong answers, and right ones that are written otherwise


def perturbed(gold: str) -> Iterator[Changed]:
    """The answer + 1, times 10, negated, swapped and flipped, where that makes another answer."""
    value = rational(gold)
    made = _perturbed_text(normalise(gold)) if value is None else _perturbed_number(value)
    return (Changed(gold, how, answer) for how, answer in made)


def _perturbed_number(value: Fraction) -> Iterator[tuple[str, str]]:
    yield "+1", _latex(value + 1)
    if value:
        yield "x10", _latex(10 * value)
        yield "negated", _latex(-value)
    if value.denominator != 1:
        if abs(value.numerator) not in (0, value.denominator):
            yield "flipped", _latex(1 / value)
    elif int(str(abs(value))[::-1]) != abs(value):
        yield "swapped", ("-" if value < 0 else "") + str(abs(value))[::-1]


def _latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    above, below = abs(value).as_integer_ratio()
    return f"{sign}{above}" if below == 1 else rf"{sign}\frac{{{above}}}{{{below}}}"


def _perturbed_text(text: str) -> Iterator[tuple[str, str]]:
    if _WORD.search(text):
        return
    if _is_expression(text):
        yield from (("+1", f"{text}+1"), ("x10", f"10({text})"), ("negated", f"-({text})"))
    elif re.search(r"\d", text):
        yield "+1", re.sub(r"-?\d+", lambda match: str(int(match.group()) + 1), text, count=1)
    if pair := _PAIR.fullmatch(text):
        left, one, other, right = pair.groups()
        if one != other:
            yield "swapped", f"{left}{other}, {one}{right}"
        if left + right != "()" and "infty" not in text:
            yield "flipped", f"{'[' if left == '(' else '('}{one}, {other}{right}"
    if "+" in text:
        yield "flipped", text.replace("+", "-", 1)
    elif "-" in text[1:]:
        yield "flipped", text[0] + text[1:].replace("-", "+", 1)


def rewritten(gold: str) -> Iterator[Changed]:
    """Answers that equal a gold answer, and take algebra to find that out."""
    text = normalise(gold)
    if rational(gold) is None and not _WORD.search(text):
        yield from (Changed(gold, how, answer) for how, answer in _rewritten_text(text))


def _rewritten_text(text: str) -> Iterator[tuple[str, str]]:
    if _is_expression(text):
        yield "2(X)/2", rf"\frac{{2({text})}}{{2}}"
        yield "1+X-1", f"1+{text}-1"
        yield "(X)+0", f"({text})+0"
    pair = _PAIR.fullmatch(text)
    if pair and "infty" not in text:
        left, one, other, right = pair.groups()
        yield "pair", rf"{left}{one}, \frac{{2({other})}}{{2}}{right}"
    if _LIST.fullmatch(text):
        yield "reversed", ", ".join(reversed(text.split(", ")))
    if text.count("=") == 1:
        yield "twice", "2({})=2({})".format(*text.split("="))


def _is_expression(text: str) -> bool:
    return not any(mark in text for mark in (",", "=", "<", ":", "_", "matrix", r"\cup", r"\in"))


# Measuring


@dataclass(frozen=True)
class Measured:
    """Verdicts on some pairs: how many there are, how many are as they should be, and the time."""

    what: str
    pairs: int
    right: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    found = []
    for what, pairs, equal in trials(asked.data):
        found.append(measured(what, asked.workers, pairs, equal))
        console.say(f"{what}: {found[-1].right} of {len(pairs)}, {found[-1].seconds:.1f} s")
    console.print_table(table(found))
    about = {"machine": platform.machine(), "retort": __version__, "workers": asked.workers}
    about["trials"] = [asdict(each) for each in found]
    asked.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def table(found: Sequence[Measured]) -> Table:
    result = Table("what", "as it should be", "of", "share", "per second")
    for each in found:
        share = f"{100 * each.right / each.pairs:.2f} %"
        pace = f"{each.pairs / each.seconds:.0f}"
        result.add_row(each.what, str(each.right), str(each.pairs), share, pace)
    return result


def trials(data: Path) -> Iterator[Trial]:
    """What is graded, the pairs of gold answer and text, and which of them are equal."""
    paths = [path for name in SETS if (path := data / f"{name}.jsonl").is_file()]
    for path in paths:
        golds = golds_of(path)
        for name, wording in WORDINGS.items():
            pairs = [(gold, wording(gold)) for gold in golds]
            yield (f"{path.stem}, {name}", pairs, [True] * len(pairs))
        if path.stem == "gsm8k_test":
            pairs = [
                (gold, str(row["answer"])) for gold, row in zip(golds, read(path), strict=True)
            ]
            yield (f"{path.stem}, solutions", pairs, [True] * len(pairs))
    if (path := data / "equivalence.jsonl").is_file():
        judged = read(path)
        pairs = [(row["gold"], _boxed(row["pred"])) for row in judged]
        yield (path.stem, pairs, [row["equal"] for row in judged])
    for path in paths:
        for change, equal in ((perturbed, False), (rewritten, True)):
            changed = [each for gold in golds_of(path) for each in change(gold)]
            if changed:
                pairs = [(each.gold, _boxed(each.answer)) for each in changed]
                yield (f"{path.stem}, {change.__name__}", pairs, [equal] * len(pairs))
        yield (f"{path.stem}, as sampled", *_as_sampled(golds_of(path)))


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


def _as_sampled(golds: Sequence[str], n: int = 32) -> tuple[list[Pair], list[bool]]:
    """n answers to each of 500 problems: a third right, half of those written otherwise."""
    draw = random.Random(0)
    pairs, equal = [], []
    for gold in golds[:500]:
        right = [gold, *(each.answer for each in rewritten(gold))]
        wrong = [each.answer for each in perturbed(gold)] or ["none"]
        for _ in range(n):
            equal.append(draw.random() < 1 / 3)
            pairs.append((gold, _boxed(draw.choice(right if equal[-1] else wrong))))
    return pairs, equal


def measured(what: str, workers: int, pairs: list[Pair], equal: list[bool]) -> Measured:
    with Grader(workers=workers) as grader:
        # the workers start and read their first expression: not what is timed
        grader.judge([(f"x+{i}", f"{i}+x") for i in range(8 * workers)])
        begun = time.perf_counter()
        verdicts = grader.grade(pairs)
        seconds = time.perf_counter() - begun
    right = sum(each.correct == as_judged for each, as_judged in zip(verdicts, equal, strict=True))
    return Measured(what, len(pairs), right, seconds)


if __name__ == "__main__":
    main()
