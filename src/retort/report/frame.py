"""The frame of a page: self-contained HTML around text and live figures.

The page loads nothing: its Content-Security-Policy allows no request, and no script but the one
written here, by hash.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import altair as alt
import vl_convert

from retort.report import plots

FIGURES = "figures.js"


def page(
    title: str,
    body: Iterable[str],
    specs: Mapping[str, Any],
    name_width: int,
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
) -> str:
    """The page as HTML text.

    Args:
        title: plain text.
        body: HTML in which what a model, a data set or a user wrote is escaped.
        specs: Vega-Lite figures by the id of the element that each is drawn in.
        name_width: pixels that the longest entry of a legend takes.
        data: what the scripts read, by name.
        scripts: assets that run after the one that draws the figures.
    """
    script = _script(FIGURES, *scripts)
    figures = {
        "specs": specs,
        "light": plots.style(dark=False, background="transparent"),
        "dark": plots.style(dark=True, background="transparent"),
        "nameWidth": name_width,
    }
    return Template(_asset("page.html")).substitute(
        policy=_policy(script),
        title=escape(title),
        style=_asset("page.css"),
        body="\n".join(body),
        data="\n".join(_data(*each) for each in ({"figures": figures} | dict(data or {})).items()),
        script=script,
    )


def _data(id: str, value: object) -> str:
    return f'<script type="application/json" id="data-{escape(id)}">{_script_json(value)}</script>'


def spec(chart: alt.LayerChart) -> dict[str, Any]:
    """A chart for `page`, as wide as its element."""
    sized = chart.properties(width="container", height=250)
    return {key: value for key, value in sized.to_dict().items() if key != "config"}


def section(title: str, content: str) -> str:
    """A heading in plain text, and HTML under it."""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{content}</section>'


def anchor(title: str) -> str:
    """The id of a section, which links to it use."""
    return "-".join(re.findall(r"[a-z]+", title.lower()))


def contents(titles: Iterable[str]) -> str:
    """Links to the sections with these titles."""
    links = (f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in titles)
    return f'<nav aria-label="Contents">{" ".join(links)}</nav>'


def charts(ids: Iterable[str]) -> str:
    """The elements that figures are drawn in, two side by side."""
    places = (f'<div class="chart" id="{escape(id)}"></div>' for id in ids)
    return f'<div class="figures">{"".join(places)}</div>'


def table(head: str, rows: Iterable[str]) -> str:
    """A table of `row`s under rows of headings; what is too wide for the page scrolls in it."""
    content = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def row(name: str, cells: Iterable[str]) -> str:
    """A row of cells, with its name in front."""
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def cell(label: str, value: str) -> str:
    """A cell, and the label that stands before it where the page is narrow."""
    return f'<td data-label="{escape(label)}">{escape(value)}</td>'


def words(label: str, value: str) -> str:
    """A cell of words, which begin at the left as numbers end at the right."""
    return f'<td class="words" data-label="{escape(label)}">{escape(value)}</td>'


def head(*titles: str, worded: int = 1) -> str:
    """A row of headings, in plain text; the first so many are over columns of words."""
    kinds = (' class="words"' if i < worded else "" for i in range(len(titles)))
    cells = (f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, titles, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def estimate_cell(label: str, value: str, spread: str) -> str:
    """A cell of a value with its interval, or another remark, in small type."""
    small = f"<small>{escape(spread)}</small>"
    return f'<td data-label="{escape(label)}">{escape(value)}{small}</td>'


def note(text: str) -> str:
    """A paragraph that explains, in plain text."""
    return f'<p class="note">{escape(text)}</p>'


# Controls


def select(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    """A menu of values and their titles; the first is chosen."""
    items = (f'<option value="{escape(key)}">{escape(title)}</option>' for key, title in options)
    menu = f'<select name="{name}" autocomplete="off">{"".join(items)}</select>'
    return f'<label class="field"><span>{escape(label)}</span>{menu}</label>'


def checkbox(name: str, label: str, checked: bool = False, before: str = "") -> str:
    """A box to tick; `before` is HTML that stands between it and its label."""
    state = " checked" if checked else ""
    box = f'<input type="checkbox" name="{name}" autocomplete="off"{state}>'
    return f'<label class="box">{box}{before}<span>{escape(label)}</span></label>'


def symbol(i: int) -> str:
    """The mark of model `i`, coloured by the page's script, which knows the scheme."""
    outlines = list(plots.SHAPES.values())
    path = f'<path d="{outlines[i % len(outlines)]}"/>'
    return (
        f'<svg class="symbol" data-model="{i}" viewBox="-8 -8 16 16" aria-hidden="true">'
        f"{path}</svg>"
    )


def folded(summary: str, content: str) -> str:
    """HTML that opens at a click on the summary, which is plain text."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def foldable(summary: str, text: str) -> str:
    """Plain text that opens at a click on the summary, which is HTML."""
    return (
        f"<details><summary>{summary}</summary>"
        f'<div class="text" tabindex="0">{escape(text)}</div></details>'
    )


@cache  # bundling takes a second, and tests make many pages
def _script(*assets: str) -> str:
    source = "\n".join(_asset(name) for name in assets)
    script = vl_convert.javascript_bundle(source, vega_lite_version())
    assert "</script" not in script.lower()
    return script


def _asset(name: str) -> str:
    return (files("retort.report") / "assets" / name).read_text(encoding="utf-8")


def vega_lite_version() -> str:
    """The one that Altair writes charts for, as `6.4`."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _policy(script: str) -> str:
    """No request, one script; the figures' tooltips bring a <style> element, hence the unsafe."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(value: object) -> str:
    """JSON that stays inside its script element whatever the strings are."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
