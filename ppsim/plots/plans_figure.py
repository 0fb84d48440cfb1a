"""Plans figure: the time of a training step against the memory of its fullest rank."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from ppsim.planning.plans import Plans
from ppsim.plots.style import layout, series_colour


def time_against_memory(plans: Plans) -> go.Figure:
    """Draw every plan that was predicted, a colour for each schedule, and a line through those that nothing beats.

    Parameters
    ----------
    plans : Plans
        What `plan` gave.
    """
    names = sorted({each.step.schedule for each in plans})
    picture = go.Figure(layout=layout(height=480, title=None, bottom=60, entries=len(names) + 1))
    for number, name in enumerate(names):
        chosen = [each for each in plans if each.step.schedule == name]
        picture.add_scatter(
            x=[each.total_bytes / 1e9 for each in chosen],
            y=[each.step_s for each in chosen],
            mode="markers",
            name=html.escape(name),
            marker={"color": series_colour(number), "size": 8},
            text=[html.escape(each.step.words) for each in chosen],
            hovertemplate="%{text}<br>%{x:.1f} GB, %{y:.4g} s<extra></extra>",
        )
    edge = plans.pareto
    picture.add_scatter(
        x=[each.total_bytes / 1e9 for each in edge],
        y=[each.step_s for each in edge],
        mode="lines",
        name="nothing is better in both",
        line={"shape": "vh", "width": 1, "color": "gray"},
        hoverinfo="skip",
    )
    picture.update_xaxes(title_text="memory of the fullest rank [GB]")
    picture.update_yaxes(title_text="predicted step [s]")
    return picture
