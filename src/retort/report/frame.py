"""The frame of a page: self-contained HTML around text and live figures.

The page loads nothing: its Content-Security-Policy allows no request, and no script but the one
written here, by hash.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import altair as alt
import vl_convert

from retort.report import plots


def page(title: str, body: Iterable[str], specs: Mapping[str, Any], name_width: int) -> str:
    """The page as HTML text.

    Args:
        title: plain text.
        body: HTML in which what a model, a data set or a user wrote is escaped.
        specs: Vega-Lite figures by the id of the element that each is drawn in.
        name_width: pixels that the longest entry of a legend takes.
    """
    script = _script()
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
        figures=_script_json(figures),
        script=script,
    )


def spec(chart: alt.LayerChart) -> dict[str, Any]:
    """A chart for `page`, as wide as its element."""
    sized = chart.properties(width="container", height=250)
    return {key: value for key, value in sized.to_dict().items() if key != "config"}


def section(title: str, content: str) -> str:
    """A heading in plain text, and HTML under it."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def charts(ids: Iterable[str]) -> str:
    """The elements that figures are drawn in, two side by side."""
    places = (f'<div class="chart" id="{escape(id)}"></div>' for id in ids)
    return f'<div class="figures">{"".join(places)}</div>'


def table(head: str, rows: Iterable[str]) -> str:
    """A table of `row`s under rows of headings."""
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def row(name: str, cells: Iterable[str]) -> str:
    """A row of cells, with its name in front."""
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def cell(label: str, value: str) -> str:
    """A cell, and the label that stands before it where the page is narrow."""
    return f'<td data-label="{escape(label)}">{escape(value)}</td>'


def foldable(summary: str, text: str) -> str:
    """Plain text that opens at a click on the summary, which is HTML."""
    return (
        f"<details><summary>{summary}</summary>"
        f'<div class="text" tabindex="0">{escape(text)}</div></details>'
    )


@cache  # bundling takes a second, and tests make many pages
def _script() -> str:
    script = vl_convert.javascript_bundle(_asset("page.js"), vega_lite_version())
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
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
