"""Cuts figure: the steps of several cuts of a model, and the costs of its layers."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from ppsim.plots.style import layout, series_colour


def steps_by_turn(cuts: Mapping[str, tuple[float, npt.NDArray[np.float64]]]) -> go.Figure:
    """Draw step times against the turn in which they were measured, with a colour for each cut.

    Parameters
    ----------
    cuts : mapping
        Name -> (predicted step in seconds, measured steps in seconds, one for each turn).
    """
    picture = go.Figure(layout=layout(height=320, title=None, bottom=60, entries=2 * len(cuts)))
    for number, (name, (predicted_s, measured_s)) in enumerate(cuts.items()):
        turns = list(range(len(measured_s)))
        colour, shown = series_colour(number), html.escape(name)
        picture.add_scatter(
            x=turns, y=measured_s * 1e3, mode="markers", name=f"{shown}, measured", marker={"color": colour}
        )
        picture.add_scatter(
            x=turns,
            y=[predicted_s * 1e3] * len(turns),
            mode="lines",
            name=f"{shown}, predicted",
            line={"color": colour},
        )
    picture.update_xaxes(title_text="turn")
    picture.update_yaxes(title_text="step [ms]", rangemode="tozero")
    return picture


def layer_times(layers_s: Mapping[str, float]) -> go.Figure:
    """Draw a bar for each layer: name -> seconds of F and B."""
    picture = go.Figure(layout=layout(height=260, title=None, bottom=90))
    picture.add_bar(
        x=[html.escape(name) for name in layers_s],
        y=[seconds * 1e3 for seconds in layers_s.values()],
        marker={"color": series_colour(0)},
    )
    picture.update_yaxes(title_text="F + B [ms]", rangemode="tozero")
    return picture
