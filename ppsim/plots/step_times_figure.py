"""Step times: the distribution of a step's length, sampled and measured."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from ppsim.errors import InputError
from ppsim.plots import style
from ppsim.plots.units import Unit, time_unit
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble

Seconds = npt.NDArray[np.float64]
_HEIGHT_PX = (150, 260)  # of the histogram, and of the cumulative curve below it
_GAP_PX = 22
_BINS = 40
_FEWEST_PER_BIN = 8  # on average; fewer would make a histogram of noise
_MARKED = (5, 50, 95, 99)
_TICKS = (0, 5, 25, 50, 75, 95, 100)
_MOST_POINTS = 1000
_DOUBT = 0.05  # that some part of the curve lies outside its band


@dataclass(frozen=True, kw_only=True)
class _Series:
    name: str
    step_s: Seconds  # ascending
    is_measured: bool
    colour: str


def step_times(
    ensembles: Mapping[str, Ensemble],
    *,
    measured: Mapping[str, Trace | npt.ArrayLike] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw how long steps take: above a histogram as a density, below the share of steps that took no longer.

    Points mark the 5th, 50th, 95th and 99th percentiles. The legend gives the median and the 95th. Around the curve of
    measured steps stands its 95 % confidence band: where the whole curve of endlessly many such steps would lie.

    Parameters
    ----------
    ensembles : mapping of str to Ensemble
        Predictions of `ppsim.monte_carlo`, drawn dashed.
    measured : mapping
        Name -> seconds of every measured step, or a trace whose details have them as `step_times_s`; drawn solid.
    title : str
        Of the figure.

    Notes
    -----
    The band is as wide as Dvoretzky, Kiefer and Wolfowitz's inequality says (Massart, 1990): sqrt(ln(2 / 0.05) / (2 n))
    to either side for n independent steps. A predicted curve outside it differs by more than chance.

    Raises
    ------
    InputError
        If there is nothing to draw, or if a trace has no steps' times.
    """
    samples = [(name, each.step_s, False) for name, each in ensembles.items()]
    samples += [(name, _measured(name, each), True) for name, each in (measured or {}).items()]
    if not samples:
        raise InputError('there is nothing to draw: give an ensemble by name, as in {"predicted": ensemble}')
    series = [
        _Series(name=name, step_s=np.sort(step_s), is_measured=is_measured, colour=style.series_colour(index))
        for index, (name, step_s, is_measured) in enumerate(samples)
    ]
    least_s, most_s = min(each.step_s[0] for each in series), max(each.step_s[-1] for each in series)
    unit = time_unit(float(most_s))
    height = sum(_HEIGHT_PX) + _GAP_PX
    entries_px = 29 * len(series)
    figure = go.Figure(layout=style.layout(height=height, title=title, top=entries_px + 22))
    for each in series:
        figure.add_trace(_histogram(each, (least_s, most_s), unit))
        if each.is_measured:
            figure.add_trace(_confidence(each, unit))
        figure.add_trace(_cumulative(each, unit))
        figure.add_trace(_percentiles(each, unit))
    margin = max((most_s - least_s) * 0.03, most_s * 1e-3)
    above = _HEIGHT_PX[0] / height
    span = [(least_s - margin) * unit.scale, (most_s + margin) * unit.scale] if most_s > 0 else [-1, 1]
    figure.update_layout(
        legend={"orientation": "v", "y": 1 + 10 / height, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        xaxis={
            "anchor": "y2",
            "range": span,
            "gridcolor": style.GRID,
            "zeroline": False,
            "title": {"text": f"step time [{unit.name}]", "standoff": style.AXIS_TITLE_GAP_PX},
        },
        yaxis={
            "domain": [1 - above, 1],
            "title": {"text": f"steps per {unit.name}"},
            "tickformat": "~%",
            "gridcolor": style.GRID,
            "rangemode": "tozero",
            "zeroline": False,
            "nticks": 5,
        },
        yaxis2={
            "domain": [0, _HEIGHT_PX[1] / height],
            "title": {"text": "share of steps no longer"},
            "tickvals": [tick / 100 for tick in _TICKS],
            "tickformat": ".0%",
            "range": [-0.02, 1.02],
            "gridcolor": style.GRID,
            "zeroline": False,
        },
    )
    return figure


def _measured(name: str, given: Trace | npt.ArrayLike) -> Seconds:
    if isinstance(given, Trace):
        if "step_times_s" not in given.details:
            raise InputError(f"the trace {name!r} has no step_times_s in its details: give the steps' seconds instead")
        given = given.details["step_times_s"]
    step_s = np.asarray(given, np.float64).ravel()
    if not (len(step_s) and np.isfinite(step_s).all()):
        raise InputError(f"the steps of {name!r} must be finite seconds, one or more")
    return step_s


def _histogram(series: _Series, span_s: tuple[float, float], unit: Unit) -> go.Scatter:
    """The share of steps per unit of time, so that wider bins, where steps are few, do not stand higher.

    An outline: several of them can be read on top of each other, which bars cannot.
    """
    least_s, most_s = span_s
    bins = int(np.clip(len(series.step_s) // _FEWEST_PER_BIN, 4, _BINS))
    room_s = (most_s - least_s) * 0.01 or most_s * 1e-3 or 1.0
    counts, edges_s = np.histogram(series.step_s, bins, (least_s - room_s, most_s + room_s))
    shares = counts / len(series.step_s) / (np.diff(edges_s) * unit.scale)
    return go.Scatter(
        name=html.escape(series.name),
        legendgroup=series.name,
        showlegend=False,
        x=np.repeat(edges_s, 2) * unit.scale,
        y=np.concatenate([[0], np.repeat(shares, 2), [0]]),
        mode="lines",
        line=_line(series),
        fill="tozeroy",
        fillcolor=_translucent(series.colour),
        hoverinfo="skip",
    )


def _cumulative(series: _Series, unit: Unit) -> go.Scatter:
    count = len(series.step_s)
    kept = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int))
    median_s, late_s = np.percentile(series.step_s, [50, 95])
    steps = f"{count:,} steps" if series.is_measured else f"{count:,} samples"
    return go.Scatter(
        name=f"<b>{html.escape(series.name)}</b>   {steps}, median {unit.text(median_s)}, "
        f"95% within {unit.text(late_s)}",
        legendgroup=series.name,
        yaxis="y2",
        x=np.concatenate([series.step_s[:1], series.step_s[kept]]) * unit.scale,
        y=np.concatenate([[0], (kept + 1) / count]),
        mode="lines",
        line={**_line(series), "shape": "hv", "width": 2},
        hovertemplate=f"%{{y:.1%}} take %{{x:.5g}} {unit.name} or less<extra>{html.escape(series.name)}</extra>",
    )


def _confidence(series: _Series, unit: Unit) -> go.Scatter:
    """The band around a cumulative curve of measured steps, as an outline of its steps."""
    count = len(series.step_s)
    half = math.sqrt(math.log(2 / _DOUBT) / (2 * count))
    x = np.repeat(series.step_s, 2) * unit.scale
    share = np.repeat(np.arange(count + 1) / count, 2)[1:-1]
    return go.Scatter(
        name=f"{1 - _DOUBT:.0%} confidence",
        legendgroup=series.name,
        showlegend=False,
        yaxis="y2",
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([np.minimum(share + half, 1), np.maximum(share - half, 0)[::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_translucent(series.colour),
        hoverinfo="skip",
    )


def _percentiles(series: _Series, unit: Unit) -> go.Scatter:
    found_s = np.percentile(series.step_s, _MARKED)
    return go.Scatter(
        name=html.escape(series.name),
        legendgroup=series.name,
        showlegend=False,
        yaxis="y2",
        x=found_s * unit.scale,
        y=[each / 100 for each in _MARKED],
        mode="markers",
        marker={"color": series.colour, "size": 8, "line": {"color": "#ffffff", "width": 1}},
        hovertext=[f"p{each} {unit.text(step_s)}" for each, step_s in zip(_MARKED, found_s.tolist(), strict=True)],
        hovertemplate="%{hovertext}<extra>" + html.escape(series.name) + "</extra>",
    )


def _line(series: _Series) -> dict[str, object]:
    return {"color": series.colour, "width": 1.5, "dash": "solid" if series.is_measured else "5px,2px"}


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.18)"
