"""Attribution: each rank's bubble by what it waited for."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from ppsim.explain.attribution import PARTS, attribute
from ppsim.plots import style
from ppsim.plots.units import time_unit
from ppsim.trace.trace import Trace

_NAMES = {
    "warm_up": "warm-up",
    "drain": "drain",
    "imbalance": "imbalance",
    "messages": "messages",
    "streams": "streams",
    "collectives": "gathering parameters",
    "copies": "loading activations",
    "device": "device or dispatch",
    "straggler": "straggler",
}


def attribution(traces: Mapping[str, Trace], *, title: str | None = None) -> go.Figure:
    """Draw the parts of each rank's bubble (`ppsim.attribute`) as stacked bars, in shares of the makespan.

    There is a bar for each rank and trace, those of a rank side by side. The last is the mean over ranks, as high as
    the trace's `bubble_fraction`.

    Raises
    ------
    InputError
        If there are no traces. Also what `attribute` raises.
    """
    chosen = style.named(traces)
    ranks = max(trace.ranks for trace in chosen.values())
    groups = [f"rank {rank}" for rank in range(ranks)] + ["<b>all ranks</b>"]
    has_names = len(chosen) > 1
    bars = len(chosen) * len(groups)
    names, bottom = style.names_below(list(chosen), bars) if has_names else ({}, 30)
    figure = go.Figure(layout=style.layout(height=260, title=title, bottom=bottom, entries=0))
    heights: list[float] = []
    found = {name: attribute(trace) for name, trace in chosen.items()}
    for part in PARTS:
        x: list[list[str]] = [[], []]
        y: list[float] = []
        tips: list[str] = []
        for group in range(len(groups)):
            for name, each in found.items():
                if group < ranks and group >= each.trace.ranks:
                    continue
                step_s = each.trace.makespan_s
                seconds = each.parts_s[part]
                amount = float(seconds[group]) if group < ranks else float(seconds.mean())
                x[0].append(groups[group])
                x[1].append(html.escape(name))
                y.append(amount / step_s if step_s > 0 else 0.0)
                tips.append(
                    f"{html.escape(name)}: {time_unit(step_s).text(amount)} of {time_unit(step_s).text(step_s)}"
                )
        heights = (np.array(heights) + y).tolist() if heights else y
        figure.add_trace(
            go.Bar(
                name=_NAMES[part],
                x=x if has_names else x[0],
                y=y,
                marker={"color": style.PART_COLOURS[part]},
                customdata=tips,
                hovertemplate="%{customdata}, %{y:.2%}<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_layout(
        barmode="stack",
        bargap=0.15,
        showlegend=True,
        legend={"traceorder": "normal"},
        xaxis={
            "fixedrange": True,
            "tickangle": 0,
            "dividercolor": style.GRID,
            **names,
        },
        yaxis={
            "title": {"text": "bubble, share of the step"},
            "tickformat": ".0%",
            "range": [0, max(heights, default=0.0) * 1.08 or 1],
            "gridcolor": style.GRID,
            "zeroline": False,
        },
    )
    return figure
