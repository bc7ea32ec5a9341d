"""The page in a real browser: what it draws, what it fetches, and what hands can do with it."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from retort.report import page
from retort.report.build import build
from retort.report.completions import completions
from retort.report.tally import tally
from retort.store import Run

from .chromium import Chromium, chromium
from .conftest import GRADER, RIGHT
from .filled import filled
from .pages import HOSTILE
from .test_choices import scored

pytestmark = pytest.mark.multiprocess

MakeRun = Callable[..., Run]
NAMES = ("teacher", f"pure {HOSTILE}", f"hybrid-{'x' * 60}")
SKILL = (0.5, 0.4, 0.45)
TAB = "\ue004"

LINES = "document.querySelectorAll('#explorer-cost .mark-line path').length"
SYMBOLS = "#explorer-cost .mark-symbol path"
DRAWN = f"{LINES} > 0 && document.querySelector('#explorer-k .mark-line path')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver on PATH (Debian: chromium, chromium-driver)")
    with chromium(*filter(None, programs)) as opened:
        yield opened


@dataclass(frozen=True)
class Report:
    file: Path
    completions: int


@pytest.fixture(scope="module")
def report(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Three models on eight problems; the second has a hostile name and writes hostile texts."""
    tallies = [tally(_run(make_run, *each), GRADER) for each in zip(NAMES, SKILL, strict=True)]
    shown = completions(tallies)
    curves = filled(build(tallies), ["judge"])
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page.render(curves, shown, training=True), encoding="utf-8")
    return Report(file, len(shown.completions))


def _run(make_run: MakeRun, name: str, skill: float) -> Run:
    rng = random.Random(name)
    answers = [RIGHT, "7", "12", None]
    weights = [skill, 0.2, 0.2, 0.05]
    outcomes = {f"p{i}": rng.choices(answers, weights, k=16) for i in range(8)}
    words = (
        f"{HOSTILE} {'x' * 300}"
        if name.startswith("pure")
        else "First, count.\n\nThe final answer is 42."
    )
    run = make_run(name, outcomes, 1000 / skill, text=lambda id, i: f"{words} {id}/{i}")
    scored(run, "judge", lambda i: [0.9, 0.25], "probability")
    return run


@pytest.fixture
def opened(browser: Chromium, report: Report) -> Chromium:
    browser.show(1280)
    browser.open(report.file)
    browser.until(DRAWN)
    return browser


def choose(browser: Chromium, form: str, name: str, value: str) -> None:
    """What a hand does to a menu or a field."""
    browser.run(
        "const field = document.getElementById(arguments[0]).elements[arguments[1]];"
        "field.value = arguments[2];"
        "for (const kind of ['input', 'change'])"
        "  field.dispatchEvent(new Event(kind, {bubbles: true}));",
        form, name, value,
    )  # fmt: skip


def click(browser: Chromium, name: str) -> None:
    browser.run(f"document.getElementById('explorer-controls').elements['{name}'].click()")


def shapes(browser: Chromium) -> list[str]:
    """Where the marks of the figure lie."""
    return browser.run(
        f"return [...document.querySelectorAll('{SYMBOLS}')].map(x => x.getAttribute('transform'))"
    )


def changed(browser: Chromium, before: list[str]) -> list[str]:
    script = f"[...document.querySelectorAll('{SYMBOLS}')].map(x => x.getAttribute('transform'))"
    browser.until(f"{script}.length && String({script}) !== {','.join(before)!r}")
    return shapes(browser)


def status(browser: Chromium, id: str = "explorer-status") -> str:
    return browser.run(f"return document.getElementById('{id}').textContent")


def test_page_opens_without_errors_and_asks_for_nothing(opened: Chromium, report: Report) -> None:
    assert opened.messages() == []
    assert opened.requests() == [report.file.as_uri()]
    assert opened.run(f"return {LINES}") == 3
    drawn = "return [...document.querySelectorAll('.chart')].filter(x => !x.querySelector('svg'))"
    opened.until("[...document.querySelectorAll('.chart')].every(x => x.querySelector('svg'))")
    assert opened.run(drawn) == []
    texts = opened.run("return document.querySelector('#explorer-cost svg').textContent")
    assert f"{NAMES[1][:17]}… ahead from" in texts
    spoken = (
        "return [...document.querySelectorAll('[role=graphics-document]')].map(x => x.ariaLabel)"
    )
    assert any(text.startswith("Coverage against completions") for text in opened.run(spoken))


def test_rule_axis_model_and_scale_change_the_figure(opened: Chromium) -> None:
    form = "explorer-controls"
    before = shapes(opened)
    choose(opened, form, "rule", "majority")
    voted = changed(opened, before)
    assert "Majority vote, the share of problems on which the most" in status(opened)
    choose(opened, form, "axis", "tokens")
    changed(opened, voted)
    assert "against tokens per problem" in status(opened)
    click(opened, "model-1")
    opened.until(f"{LINES} === 2")
    assert NAMES[1] not in status(opened)
    log = shapes(opened)
    click(opened, "log")
    changed(opened, log)
    assert opened.run("return location.hash") == "#rule=majority&axis=tokens&log=0&model-1=0"
    assert opened.messages() == []


def test_time_can_include_reading_and_judging(opened: Chromium) -> None:
    def disabled(name: str) -> bool:
        return opened.run(
            f"return document.getElementById('explorer-controls').elements['{name}'].disabled"
        )

    before = shapes(opened)
    click(opened, "prefill")
    later = changed(opened, before)
    assert not disabled("prefill")
    assert disabled("scoring")  # nothing is judged for coverage
    choose(opened, "explorer-controls", "rule", "best of k by judge")
    judged = changed(opened, later)
    assert not disabled("scoring")
    click(opened, "scoring")
    changed(opened, judged)
    choose(opened, "explorer-controls", "axis", "k")
    opened.until("document.getElementById('explorer-k').hidden")
    assert disabled("prefill")


def test_costs_are_added_up(opened: Chromium) -> None:
    """The teacher decodes 10 tokens at 2,000 a second; `filled` says what else it takes."""
    judged = "rule=best+of+k+by+judge"
    for fragment, cost in (
        ("rule=coverage", " (80 ms)"),
        ("prefill=1", " (90 ms)"),
        (f"{judged}&prefill=1&scoring=1", " (114 ms)"),
        (f"{judged}&scoring=1", " (104 ms)"),
        ("scoring=1", " (80 ms)"),
        ("axis=replayed", " (96 ms)"),
        ("axis=money", " (0.00889)"),  # 80 s for 1,000 problems, at 0.4 an hour
        ("axis=tokens&prefill=1", " (160)"),
        ("axis=k", ""),
    ):
        opened.run(f"location.hash = '{fragment}&model-1=0&model-2=0'")
        shown = "document.getElementById('explorer-status').textContent.replace(/\u202f/g, ' ')"
        opened.until(f"{shown}.includes('% with k = 16{cost}.') && {LINES} === 1")


def test_a_view_can_be_shared(browser: Chromium, report: Report) -> None:
    browser.show(1280)
    browser.open(report.file, "#rule=majority&axis=money&model-0=0")
    browser.until(f"{LINES} === 2")
    assert "against money for 1,000 problems" in status(browser)
    browser.run("document.querySelector('#explorer-table summary').click()")
    browser.until("document.querySelector('#explorer-table td')")
    cells = browser.run("return document.querySelector('#explorer-table tbody').textContent")
    assert NAMES[1] in cells
    browser.open(report.file, "#rule=nonsense&axis=&model-9=0")
    browser.until(f"{LINES} === 3")
    assert browser.messages() == []


def test_pointing_at_a_mark_draws_its_interval_on_both_sides(opened: Chromium) -> None:
    opened.run("document.documentElement.style.scrollBehavior = 'auto'")
    for name in ("model-1", "model-2"):
        click(opened, name)
    opened.until(f"{LINES} === 1")
    x, y = opened.run(
        "const mark = document.querySelector('#explorer-cost .mark-symbol path');"
        "mark.scrollIntoView({block: 'center'});"
        "const box = mark.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]"
    )
    seen = "document.querySelectorAll('.mark-rule.role-mark line[opacity=\"1\"]')"
    assert opened.run(f"return {seen}.length") == 0
    opened.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    opened.until(f"{seen}.length === 2")
    shown = opened.run("return document.getElementById('vg-tooltip-element').textContent")
    assert "teacher" in shown
    assert "completions k1" in shown


def test_a_page_of_one_completion_opens(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    found = tally(make_run("only", {"p": [RIGHT]}), GRADER)
    file = tmp_path / "report.html"
    file.write_text(page.render(build([found]), completions([found])), encoding="utf-8")
    browser.open(file)
    browser.until(DRAWN)
    click(browser, "model-0")
    browser.until(f"{LINES} === 0")
    assert "no model is chosen" in status(browser)
    assert browser.messages() == []


def test_every_axis_and_rule_can_be_drawn(opened: Chromium) -> None:
    options = "return [...document.querySelectorAll('[name={}] option')].map(x => x.value)"
    for name in ("rule", "axis"):
        for value in opened.run(options.format(name)):
            choose(opened, "explorer-controls", name, value)
            opened.until(f"{LINES} === 3")
    assert opened.messages() == []


# Completions


def listed(browser: Chromium) -> list[str]:
    return browser.run(
        "return [...document.querySelectorAll('#completions-list summary')].map(x => x.textContent)"
    )


def test_filters_change_the_list(opened: Chromium, report: Report) -> None:
    form, first = "completions-controls", listed(opened)
    assert f"of {report.completions} completions" in status(opened, "completions-status")
    choose(opened, form, "verdict", "no answer")
    silent = listed(opened)
    assert silent != first
    assert all(text.startswith("no answer") for text in silent)
    choose(opened, form, "verdict", "")
    choose(opened, form, "model", "2")
    assert all("hybrid" in text for text in listed(opened))
    choose(opened, form, "problem", "3")
    assert all("p3, sample" in text for text in listed(opened))
    choose(opened, form, "text", "P3/15")
    (only,) = listed(opened)
    assert "sample 15" in only
    choose(opened, form, "text", "nowhere")
    assert listed(opened) == []
    assert "0 completions" in status(opened, "completions-status")


def test_pages_are_turned(opened: Chromium, report: Report) -> None:
    first = listed(opened)
    assert len(first) < report.completions
    opened.run("document.querySelector('#completions-pager [value=on]').click()")
    assert not set(listed(opened)) & set(first)
    opened.run("document.querySelector('#completions-pager [value=back]').click()")
    assert listed(opened) == first


def test_steps_are_shown_with_their_scores(opened: Chromium) -> None:
    choose(opened, "completions-controls", "model", "0")
    opened.run("document.querySelector('#completions-list summary').click()")
    opened.until("document.querySelector('#completions-list .steps')")
    steps = opened.run(
        "return [...document.querySelectorAll('.steps li')].map(step => step.textContent)"
    )
    assert steps == ["First, count.judge 0.900", "The final answer is 42. p0/0judge 0.250"]
    text = opened.run("return document.querySelector('#completions-list .completion').textContent")
    for fact in ("What is p0?", "42", "10 tokens", "ended by itself", "exact"):
        assert fact in text


def test_a_hostile_completion_is_text(opened: Chromium) -> None:
    choose(opened, "completions-controls", "model", "1")
    opened.run("document.querySelector('#completions-list summary').click()")
    opened.until("document.querySelector('#completions-list .steps')")
    assert HOSTILE in opened.run("return document.querySelector('.steps').textContent")
    assert opened.run("return document.querySelectorAll('img, iframe, main script').length") == 0
    assert opened.messages() == []
    assert len(opened.requests()) == 1


# Looks and hands


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(
    browser: Chromium, report: Report, width: int, scheme: str
) -> None:
    browser.show(width, scheme)
    browser.open(report.file)
    browser.until(DRAWN)
    browser.run("for (const x of document.querySelectorAll('details')) x.open = true")
    browser.until("document.querySelector('.completion')")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_print_shows_every_section(opened: Chromium) -> None:
    opened.show(760, media="print")
    hidden = "[...document.querySelectorAll('main > section')].filter(x => !x.offsetHeight)"
    assert opened.run(f"return {hidden}") == []
    assert opened.run("return document.querySelectorAll('main > section').length") > 10
    assert opened.run("return document.querySelector('.controls').offsetHeight") == 0


def test_tab_reaches_every_control(opened: Chromium) -> None:
    def focused() -> str:
        return opened.run("return document.activeElement.name || document.activeElement.tagName")

    opened.run("document.querySelector('nav a:last-child').focus()")
    reached = []
    for _ in range(9):
        opened.press(TAB)
        reached.append(focused())
    assert reached == [
        "rule", "axis", "log", "prefill", "model-0", "model-1", "model-2", "SUMMARY", reached[8],
    ]  # fmt: skip
    opened.run("document.querySelector('#completions-controls select').focus()")
    for name in ("problem", "verdict", "sort", "text", "SUMMARY"):
        opened.press(TAB)
        assert focused() == name
