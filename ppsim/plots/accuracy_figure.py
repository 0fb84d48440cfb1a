"""Accuracy: predicted against measured steps, and how the errors are distributed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from ppsim.plots.style import BAND, layout, series_colour

_TAIL = 0.05  # of the errors, on each side of the band
_FEWEST_FOR_BAND = 20

Pairs = Mapping[str, npt.ArrayLike]
"""Name of a series -> seconds predicted and measured, shape (n, 2)."""


def accuracy(series: Pairs, *, labels: Mapping[str, Sequence[str]] | None = None) -> go.Figure:
    """Draw predicted over measured times on logarithmic axes, with the line on which they are equal.

    Grey is the band that holds the middle 90 % of all errors, if there are 20 or more.

    Parameters
    ----------
    series : mapping
        Name -> measured and predicted times.
    labels : mapping
        Name -> what each point is, shown on hovering.
    """
    picture = go.Figure(layout=layout(height=460, title=None, bottom=60, entries=len(series) + 2))
    times_ms = {name: 1e3 * np.asarray(pairs, np.float64).reshape(-1, 2) for name, pairs in series.items()}
    whole = np.concatenate(list(times_ms.values()))
    ends = [float(whole.min()) * 0.9, float(whole.max()) * 1.1]
    if len(whole) >= _FEWEST_FOR_BAND:
        low, high = np.quantile(whole[:, 0] / whole[:, 1] - 1, [_TAIL, 1 - _TAIL])
        edges = [end * (1 + error) for end, error in zip([*ends, *ends[::-1]], [low, low, high, high], strict=True)]
        name = f"{1 - 2 * _TAIL:.0%} of errors: {low:+.1%} to {high:+.1%}"
        band = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "hoverinfo": "skip"}
        picture.add_scatter(x=[*ends, *ends[::-1]], y=edges, mode="lines", name=name, **band)
    picture.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"width": 1, "dash": "dot"}, hoverinfo="skip")
    for number, (name, pairs) in enumerate(times_ms.items()):
        said = (labels or {}).get(name, [name] * len(pairs))
        errors = pairs[:, 0] / pairs[:, 1] - 1
        picture.add_scatter(
            x=pairs[:, 1],
            y=pairs[:, 0],
            mode="markers",
            name=html.escape(name),
            marker={"color": series_colour(number), "size": 7},
            text=[f"{html.escape(what)}, {error:+.2%}" for what, error in zip(said, errors, strict=True)],
            hovertemplate="%{text}<br>measured %{x:.2f} ms, predicted %{y:.2f} ms<extra></extra>",
        )
    picture.update_xaxes(title_text="measured step [ms]", type="log")
    picture.update_yaxes(title_text="predicted step [ms]", type="log")
    return picture


def errors(series: Pairs) -> go.Figure:
    """Draw which share of the predictions has at most a given relative error.

    The curve is steep at 0 where predictions are close. It passes 0 at one half where as many are too short as too
    long.
    """
    picture = go.Figure(layout=layout(height=340, title=None, bottom=60, entries=len(series)))
    for number, (name, pairs) in enumerate(series.items()):
        predicted_s, measured_s = np.asarray(pairs, np.float64).reshape(-1, 2).T
        found = np.sort(predicted_s / measured_s - 1)
        picture.add_scatter(
            x=np.append(found, found[-1:]),
            y=np.arange(len(found) + 1) / max(len(found), 1),
            mode="lines",
            name=html.escape(name),
            line={"color": series_colour(number), "width": 2, "shape": "vh"},
            hovertemplate=f"{html.escape(name)}: %{{y:.0%}} at most %{{x:+.2%}}<extra></extra>",
        )
    picture.add_vline(x=0, line={"width": 1, "dash": "dot"})
    picture.update_xaxes(title_text="(predicted - measured) / measured", tickformat="+.1%")
    picture.update_yaxes(title_text="predictions", tickformat=".0%")
    return picture
