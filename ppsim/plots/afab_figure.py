"""AFAB figure: how bubble and memory grow with ranks and microbatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.plots.style import layout, series_colour


def bubble_and_memory(points: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw the bubble fraction (left) and the microbatches held (right) against m, with a colour for each p.

    Parameters
    ----------
    points : sequence of mappings
        One for each (p, m): `ranks`, `microbatches`, and `bubble_*` and `held_*` for theory, simulated and measured.
    """
    picture = make_subplots(cols=2, horizontal_spacing=0.1)
    for number, ranks in enumerate(sorted({point["ranks"] for point in points})):
        chosen = [point for point in points if point["ranks"] == ranks]
        count = [point["microbatches"] for point in chosen]
        colour = series_colour(number)
        looks = {
            "theory": {"mode": "lines", "line": {"color": colour, "width": 1.5}},
            "simulated": {"mode": "markers", "marker": {"symbol": "circle-open", "size": 12, "color": colour}},
            "measured": {"mode": "markers", "marker": {"symbol": "circle", "size": 6, "color": colour}},
        }
        for column, quantity in enumerate(("bubble", "held"), start=1):
            for source, look in looks.items():
                picture.add_scatter(
                    x=count,
                    y=[point[f"{quantity}_{source}"] for point in chosen],
                    name=f"p = {ranks}, {source}",
                    showlegend=column == 1,
                    legendgroup=f"{ranks} {source}",
                    row=1,
                    col=column,
                    **look,
                )
    picture.update_layout(layout(height=460, title=None, bottom=60), overwrite=True)  # with the template of subplots
    picture.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"})
    ticks = sorted({point["microbatches"] for point in points})
    picture.update_xaxes(title_text="microbatches m", type="log", tickvals=ticks)
    picture.update_yaxes(title_text="bubble fraction", tickformat=".0%", rangemode="tozero", col=1)
    picture.update_yaxes(title_text="peak activations [microbatches]", type="log", tickvals=ticks, col=2)
    return picture
