"""Report: headings, text, tables and figures in one HTML file that needs no network."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ppsim.export.figure_file import resource, save_figure
from ppsim.export.table_cells import Table, cell_text, columns_of
from ppsim.files import write_text

_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    # Without plotly's button that uploads a chart: a report stays where it is.
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}
_CONTENTS_FROM = 4  # sections


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
    """A document that `add` lengthens and `save` writes.

    Every text may hold anything: it is escaped. In `lead`, `text` and `caption` blank lines part paragraphs and
    `backticks` mark code.

    Parameters
    ----------
    title : str
        Heading, and the title of the page.
    subtitle : str
        One line below the title.
    lead : str
        What the reader should know first.
    facts : mapping
        A few numbers shown large, label -> value.

    Examples
    --------
    >>> report = Report(title="AFAB on 4 ranks").add("Bubble", text="As theory says.", table=[{"p": 4, "m": 8}])
    >>> "<h2>Bubble</h2>" in report.to_html()
    True
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
        """Append a section, which shows heading, text, figure, caption, table and definitions in this order.

        Parameters
        ----------
        heading : str
            "" continues the section before.
        table : sequence of mappings
            A mapping for each row, column name -> value. Columns are those of all rows; a missing value shows as a
            dash. Columns of amounts ("12.5", "12.5 ms", 3) are right-aligned. Floats get four significant digits.
        definitions : mapping
            Term -> value, as for an environment.
        figure : plotly.graph_objects.Figure
            It takes the page's width and keeps its height; the given object is not changed.

        Returns
        -------
        Report
            This report, so that calls can be chained.
        """
        self.sections.append(
            Section(heading=heading, text=text, table=table, definitions=definitions, figure=figure, caption=caption)
        )
        return self

    def save(self, path: str | Path) -> None:
        """Write the report to one self-contained HTML file; the same report gives the same bytes."""
        write_text(path, self.to_html())

    def save_figures(self, directory: Path, ending: str) -> list[str]:
        """Write each figure as a picture by itself.

        Parameters
        ----------
        directory : Path
            Where.
        ending : str
            ".svg", ".png" or ".pdf".

        Returns
        -------
        list of str
            The files' names: the number of the figure in the report, and its heading.

        Raises
        ------
        InputError
            As `ppsim.export.figure_file.save_figure`.
        """
        names: list[str] = []
        heading = ""
        for section in self.sections:
            heading = section.heading or heading
            if section.figure is not None:
                words = re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")[:60]
                names.append(f"figure_{len(names) + 1}_{words}{ending}")
                save_figure(section.figure, directory / names[-1])
        return names

    def to_html(self) -> str:
        """The whole file as text. plotly.js is in it once, and only if there is a figure."""
        has_figure = any(section.figure is not None for section in self.sections)
        headed = [(number, part.heading) for number, part in enumerate(self.sections, start=1) if part.heading]
        return _template().render(
            report=self,
            style=resource("theme.css") + resource("html_report.css"),
            scripts=[get_plotlyjs(), resource("cell_numbers.js"), resource("html_report.js")] if has_figure else [],
            contents=headed if len(headed) >= _CONTENTS_FROM else [],
            config=json.dumps(_CONFIG),
        )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"paragraphs": _paragraphs, "cell": cell_text, "columns": _columns, "drawable": _drawable}
    return environment.from_string(resource("html_report.html.jinja"))


def _paragraphs(text: str) -> list[list[str]]:
    """Each paragraph cut at pairs of backticks: text and code in turn, text first."""
    return [re.split("`([^`]+)`", part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _drawable(figure: go.Figure) -> dict[str, str]:
    """The figure as plotly's JSON, and its height in pixels."""
    shown = go.Figure(figure)
    # The page's colours, light or dark, shine through; the style sheet recolours the axes' text to suit.
    shown.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", width=None, autosize=True)
    return {"json": shown.to_json(), "height": f"{shown.layout.height or 450:g}"}


def _columns(rows: Table) -> dict[str, str]:
    """The columns of all rows, each with the attribute of its cells."""
    return {name: Markup(' class="amount"') if is_amount else "" for name, is_amount in columns_of(rows).items()}
