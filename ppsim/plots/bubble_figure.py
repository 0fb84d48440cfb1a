"""Bubbles: for what share of the step each rank is not computing."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from ppsim.plots import style
from ppsim.plots.units import time_unit
from ppsim.trace.trace import Trace

_LABELLED_BARS = 30


def bubbles(traces: Mapping[str, Trace], *, title: str | None = None) -> go.Figure:
    """Draw the bubble of each rank as a share of its trace's makespan, grouped by rank.

    The last group is all ranks together, `Trace.bubble_fraction`. Up to 30 bars show their percentage.

    Raises
    ------
    InputError
        If there are no traces.
    """
    chosen = style.named(traces)
    ranks = max(trace.ranks for trace in chosen.values())
    labelled = len(chosen) * (ranks + 1) <= _LABELLED_BARS
    largest = 0.0
    height = 230 if len(chosen) <= style.ENTRIES_ABOVE else max(230, 22 * len(chosen))
    figure = go.Figure(layout=style.layout(height=height, title=title, bottom=30, entries=len(chosen)))
    for index, (name, trace) in enumerate(chosen.items()):
        step_s = trace.makespan_s
        unit = time_unit(step_s)
        shares = trace.bubble_s / step_s if step_s > 0 else np.zeros(trace.ranks)
        values = np.append(shares, trace.bubble_fraction)
        times = [unit.text(float(bubble_s)) for bubble_s in trace.bubble_s] + [unit.text(float(trace.bubble_s.mean()))]
        tip = f"%{{x}}: %{{y:.2%}} of {unit.text(step_s)}, %{{customdata}}<extra>%{{fullData.name}}</extra>"
        largest = max(largest, float(values.max()))
        figure.add_trace(
            go.Bar(
                name=html.escape(name),
                x=[f"rank {rank}" for rank in range(trace.ranks)] + ["<b>all ranks</b>"],
                y=values,
                marker={
                    "color": style.series_colour(index),
                    "pattern": {"shape": ("", "/", "x")[min(style.series_round(index), 2)], "solidity": 0.3},
                },
                text=[f"{value:.1%}" for value in values] if labelled else None,
                textposition="outside",
                cliponaxis=False,
                customdata=times,
                hovertemplate=tip,
            )
        )
    categories = [f"rank {rank}" for rank in range(ranks)] + ["<b>all ranks</b>"]
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        bargroupgap=0.05,
        showlegend=True,
        xaxis={"categoryorder": "array", "categoryarray": categories, "fixedrange": True},
        yaxis={
            "title": {"text": "bubble, share of the step"},
            "tickformat": ".0%",
            "range": [0, largest * 1.15 or 1],
            "gridcolor": style.GRID,
            "zeroline": False,
        },
    )
    return figure
