"""Loss figure: curves of trainings, and their distances from a reference."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.plots.style import layout, series_colour


def loss_curves(
    reference: Sequence[float], curves: Mapping[str, Sequence[float]], *, allowed: Sequence[float]
) -> go.Figure:
    """Draw losses by step (left) and their distances from a reference (right).

    Parameters
    ----------
    reference : sequence of float
        The loss of each step in one process.
    curves : mapping
        Name -> the loss of each step. The curve "control" is drawn on the right only.
    allowed : sequence of float
        How far each step's loss may be from the reference.
    """
    steps = list(range(len(reference)))
    picture = make_subplots(cols=2, horizontal_spacing=0.1)
    picture.add_scatter(x=steps, y=reference, name="one process", line={"color": "#888888", "width": 5}, row=1, col=1)
    for number, (name, losses) in enumerate(curves.items()):
        look = {"name": html.escape(name), "legendgroup": name, "line": {"color": series_colour(number), "width": 1.5}}
        if name != "control":
            picture.add_scatter(x=steps, y=losses, mode="lines", showlegend=False, row=1, col=1, **look)
        apart = [
            abs(mine - theirs) or None for mine, theirs in zip(losses, reference, strict=True)
        ]  # no logarithm of 0
        picture.add_scatter(x=steps, y=apart, mode="lines+markers", row=1, col=2, **look)
    line = {"color": "#888888", "dash": "dash"}
    picture.add_scatter(x=steps, y=allowed, name="allowed", mode="lines", line=line, row=1, col=2)
    picture.update_layout(layout(height=460, title=None, bottom=60), overwrite=True)  # with the template of subplots
    picture.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"})
    picture.update_xaxes(title_text="step")
    picture.update_yaxes(title_text="loss", col=1)
    picture.update_yaxes(title_text="distance from one process's", type="log", exponentformat="power", col=2)
    return picture
