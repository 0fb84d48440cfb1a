"""Small multiples: many steps side by side, each in a small panel, all on one scale of time."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.plots import style
from ppsim.plots.lane_block import BAR
from ppsim.plots.units import Unit, time_unit
from ppsim.trace.trace import Trace

_LANE_PX, _GAP_PX = 11, 44  # height of a rank's lane where a trace has the most ranks; gap between rows of panels


@checked
def small_multiples(traces: Mapping[str, Trace], *, columns: int = 3, title: str | None = None) -> go.Figure:
    """Draw steps as small panels in rows, so that many schedules are compared at a glance.

    Parameters
    ----------
    traces : mapping of str to Trace
        Title of the panel -> step. Panels follow one another along rows.
    columns : int
        Panels in a row.
    title : str, optional
        Title of the figure.

    Returns
    -------
    plotly.graph_objects.Figure
        All panels have one scale of time, and start at 0. A lane is a rank, the first at the top. A bar has the colour
        of its kind; grey is bubble. The title of a panel gives the step time and the bubble fraction. `timeline` has
        what is left out here: numbers of microbatches, stages, messages.

    Raises
    ------
    InputError
        If there are no traces, or no columns.
    """
    drawn = style.named(traces)
    if columns < 1:
        raise InputError(f"columns must be 1 or more, got {columns}")
    columns = min(columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    unit = time_unit(max(trace.makespan_s for trace in drawn.values()))
    longest = max(trace.makespan_s for trace in drawn.values()) * unit.scale
    panel_px = _LANE_PX * max(trace.ranks for trace in drawn.values())
    height = rows * (panel_px + _GAP_PX) - _GAP_PX
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[
            f"{html.escape(name)}  {unit.text(trace.makespan_s)}, {trace.bubble_fraction:.1%}"
            for name, trace in drawn.items()
        ],
        horizontal_spacing=0.03,
        vertical_spacing=_GAP_PX / height if rows > 1 else 0,
    )
    for number, trace in enumerate(drawn.values()):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        figure.add_traces(_panel(trace, unit), rows=place["row"], cols=place["col"])
        is_lowest = number + columns >= len(drawn)
        figure.update_xaxes(
            range=[0, longest * 1.005 or 1],
            showticklabels=is_lowest,
            title_text=f"time [{unit.name}]" if is_lowest else None,
            title_standoff=style.AXIS_TITLE_GAP_PX,
            title_font={"size": 12},
            gridcolor=style.GRID,
            zeroline=False,
            **place,
        )
        figure.update_yaxes(
            range=[trace.ranks - 0.5, -0.5], showticklabels=False, showgrid=False, zeroline=False, **place
        )
    _name_each_once(figure)
    figure.update_layout(style.layout(height=height, title=title, top=64))
    figure.update_layout(barmode="overlay", margin={"l": 20})
    figure.update_layout(legend={"y": 1 + 34 / height})
    figure.update_annotations(xanchor="center", font={"size": 12})
    return figure


def _panel(trace: Trace, unit: Unit) -> list[go.Bar]:
    """The bars of the bubble behind all lanes, and the bars of each kind."""
    program, zero_s, scale = trace.program, float(trace.start_s.min()), unit.scale
    bars = [
        go.Bar(
            name="bubble",
            legendgroup="bubble",
            legendrank=2000,
            orientation="h",
            y=np.arange(trace.ranks),
            x=np.full(trace.ranks, trace.makespan_s * scale),
            width=BAR,
            marker={"color": style.BUBBLE, "line": {"width": 0}},
            hoverinfo="skip",
        )
    ]
    for kind, colour in style.KIND_COLOURS.items():
        rows = np.flatnonzero(program.kind == kind)
        if not len(rows):
            continue
        lengths_s = trace.end_s[rows] - trace.start_s[rows]
        each = zip(program.stage[rows].tolist(), program.microbatch[rows].tolist(), lengths_s.tolist(), strict=True)
        bars.append(
            go.Bar(
                name=style.KIND_NAMES[kind],
                legendgroup=kind.name,
                orientation="h",
                y=program.rank[rows],
                base=(trace.start_s[rows] - zero_s) * scale,
                x=lengths_s * scale,
                width=BAR,
                marker={"color": colour, "line": {"color": "#ffffff", "width": 0.3}},
                # The text says the length: a template's x would be the end of a bar with a base.
                hovertext=[f"{stage}{kind.name}{b}, {unit.text(length_s)}" for stage, b, length_s in each],
                hoverinfo="text",
            )
        )
    return bars


def _name_each_once(figure: go.Figure) -> None:
    """One entry of the legend for each kind, whatever the panels."""
    seen: set[str] = set()
    for each in figure.data:
        each.showlegend = each.legendgroup not in seen
        seen.add(each.legendgroup)
