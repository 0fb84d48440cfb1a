"""Report: headings, text, tables and figures in one HTML file that needs no network."""

from __future__ import annotations

import html
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

Table = Sequence[Mapping[str, Any]]

# Nothing may be loaded from anywhere. plotly compiles the drawing code of its WebGL charts, hence 'unsafe-eval'.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:"
# plotly's button that uploads a chart is taken away: a report keeps its numbers to itself.
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}
_CONTENTS_FROM = 4  # sections
_AMOUNT = re.compile(r"[-+−–]?[\d.,]+(e[-+]?\d+)?\s?(%|×|[nµm]?s|[KMGT]?i?B|[KMGT]?i?B/s)?")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report; see `Report.add`."""

    heading: str
    text: str = ""
    table: Table | None = None
    definitions: Mapping[str, Any] | None = None
    figure: go.Figure | None = None
    caption: str = ""


@dataclass(kw_only=True)
class Report:
    """A document that grows by `add` and ends in `save`; hence not frozen.

    title: also the page's title. subtitle: one line below it. lead: what the reader should know first. facts: a few
    numbers shown large, label to value. Every text may hold anything: it is escaped. In `lead`, `text` and
    `caption` blank lines part paragraphs and `backticks` mark code.

        Report(title="AFAB on 4 ranks").add("Timeline", text="...", figure=timeline(traces)).save("report.html")
    """

    title: str
    subtitle: str = ""
    lead: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def add(
        self,
        heading: str,
        *,
        text: str = "",
        table: Table | None = None,
        definitions: Mapping[str, Any] | None = None,
        figure: go.Figure | None = None,
        caption: str = "",
    ) -> Report:
        """Append a section and return the report. Shown in this sequence: heading, text, figure, caption, table,
        definitions.

        heading: "" continues the section before. table: a mapping per row, column name to value; columns are those of
        all rows, a missing value shows as a dash. Columns of amounts ("12.5", "12.5 ms", 3) are right-aligned; floats
        get four significant digits, ints their thousands parted. definitions: term to value, as for an environment.
        figure: takes the page's width and keeps its height; the given one is not changed.
        """
        self.sections.append(
            Section(heading=heading, text=text, table=table, definitions=definitions, figure=figure, caption=caption)
        )
        return self

    def save(self, path: str | Path) -> None:
        """Write the report to one self-contained HTML file; the same report gives the same bytes."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def to_html(self) -> str:
        """The whole file as text. plotly.js is in it once, and only if there is a figure."""
        has_figure = any(section.figure is not None for section in self.sections)
        scripts = [get_plotlyjs(), _resource("html_report.js")] if has_figure else []
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en">',
                "<head>",
                '<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                f"<title>{html.escape(self.title)}</title>",
                f"<style>\n{_resource('html_report.css')}</style>",
                *(f"<script>{script}</script>" for script in scripts),
                "</head>",
                "<body>",
                *self._head(),
                *(_section(number, section) for number, section in enumerate(self.sections, start=1)),
                "</body>",
                "</html>",
                "",
            ]
        )

    def _head(self) -> list[str]:
        parts = [f"<h1>{html.escape(self.title)}</h1>"]
        if self.subtitle:
            parts.append(f'<p class="subtitle">{html.escape(self.subtitle)}</p>')
        if self.lead:
            parts.append(f'<div class="lead">{_paragraphs(self.lead)}</div>')
        if self.facts:
            items = "".join(
                f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(_cell(value))}</dd></div>"
                for label, value in self.facts.items()
            )
            parts.append(f'<dl class="facts">{items}</dl>')
        headed = [(number, part.heading) for number, part in enumerate(self.sections, start=1) if part.heading]
        if len(headed) >= _CONTENTS_FROM:
            links = " ".join(f'<a href="#section-{number}">{html.escape(name)}</a>' for number, name in headed)
            parts.append(f'<nav aria-label="Contents">{links}</nav>')
        return ["<header>", *parts, "</header>"]


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="section-{number}">']
    if section.heading:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
    if section.text:
        parts.append(_paragraphs(section.text))
    if section.figure is not None:
        caption = f"<figcaption>{_paragraphs(section.caption)}</figcaption>" if section.caption else ""
        parts.append(f"<figure>{_figure(f'figure-{number}', section.figure)}{caption}</figure>")
    elif section.caption:
        parts.append(f'<div class="caption">{_paragraphs(section.caption)}</div>')
    if section.table:
        parts.append(_table(section.table))
    if section.definitions:
        parts.append(_definitions(section.definitions))
    return "\n".join([*parts, "</section>"])


def _resource(name: str) -> str:
    return resources.files("ppsim.export").joinpath(name).read_text(encoding="utf-8")


def _paragraphs(text: str) -> str:
    paragraphs = [html.escape(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    return "".join("<p>" + re.sub("`([^`]+)`", r"<code>\1</code>", part) + "</p>" for part in paragraphs)


def _figure(identifier: str, figure: go.Figure) -> str:
    """A place for the figure, and the script that draws it there."""
    shown = go.Figure(figure)
    # The page's colours, light or dark, shine through; the style sheet recolours the axes' text to suit.
    shown.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", width=None, autosize=True)
    height = shown.layout.height or 450
    # plotly writes "<" in JSON as \u003c, so no string in it can end the script element.
    arguments = f"{json.dumps(identifier)}, {shown.to_json()}, {json.dumps(_CONFIG)}"
    place = f'<div id="{identifier}" class="plot" style="height:{height:g}px"></div>'
    return f"{place}\n<script>draw({arguments});</script>\n"


def _table(rows: Table) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    right = {column: all(_is_amount(row.get(column)) for row in rows) for column in columns}
    mark = {column: ' class="amount"' if right[column] else "" for column in columns}
    head = "".join(f'<th scope="col"{mark[column]}>{html.escape(str(column))}</th>' for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{mark[column]}>{html.escape(_cell(row.get(column)))}</td>" for column in columns)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _definitions(definitions: Mapping[str, Any]) -> str:
    items = "\n".join(
        f"<dt>{html.escape(str(term))}</dt><dd>{html.escape(_cell(value))}</dd>" for term, value in definitions.items()
    )
    return f'<dl class="definitions">\n{items}\n</dl>'


def _is_amount(value: Any) -> bool:
    """True for numbers, for text that is a number with or without a unit, and for a missing value."""
    if value is None:
        return True
    if isinstance(value, str):
        return _AMOUNT.fullmatch(value.strip()) is not None
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        return f"{number:,.4g}" if abs(number) < 1e4 else f"{number:,.0f}" if abs(number) < 1e9 else f"{number:.4g}"
    return str(value)
