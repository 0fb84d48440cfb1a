"""Trade-off figure: what schedules hold against what they waste."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ppsim.plots.style import layout, series_colour, series_round


def memory_against_bubble(entries: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw peak memory to the right and bubble upwards, with a colour for each schedule.

    Parameters
    ----------
    entries : sequence of mappings
        One for each schedule: its name as `schedule`, and `peak_activation_bytes` and `bubble_fraction`, each with
        `predicted` and `measured`.
    """
    picture = go.Figure(layout=layout(height=420, title=None, bottom=60, entries=len(entries)))
    for number, entry in enumerate(entries):
        for source, symbol, size in (("predicted", "circle-open", 14), ("measured", "circle", 7)):
            picture.add_scatter(
                x=[entry["peak_activation_bytes"][source] / 2**20],
                y=[entry["bubble_fraction"][source]],
                mode="markers",
                name=html.escape(entry["schedule"]),
                legendgroup=entry["schedule"],
                showlegend=source == "measured",
                marker={
                    "symbol": symbol.replace("circle", ("circle", "diamond", "square")[series_round(number) % 3]),
                    "size": size,
                    "color": series_colour(number),
                    "line": {"width": 2 if source == "predicted" else 0},
                },
                hovertemplate=f"{html.escape(entry['schedule'])}, {source}: %{{x:.2f}} MiB, %{{y:.2%}}<extra></extra>",
            )
    picture.update_xaxes(title_text="peak activations of the fullest rank [MiB]", rangemode="tozero")
    picture.update_yaxes(title_text="bubble fraction", tickformat=".0%", rangemode="tozero")
    return picture
