"""Link figure: what messages cost by size, and the fitted link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.network.link import Link
from ppsim.plots.style import GRID, layout, series_colour
from ppsim.plots.units import bytes_text

_SHOWN = (
    {"asleep": "to a sleeping receiver", "awake": "to an awake receiver", "late": "receive posted late"},
    {
        "occupied": "each further message of a burst",
        "send": "the sender, in the call",
        "post": "the receiver, posting",
    },
)


def link_times(rows: Sequence[Mapping[str, Any]], link: Link, *, name: str) -> go.Figure:
    """Draw the time of single messages (left), and how long link and ranks are occupied (right), against size.

    Both axes are logarithmic. The first series of each panel has a fit, a line of the same colour. asleep: the receiver
    has waited long enough for its core to sleep. awake: it has just been busy. late: it posts its receive after the
    message was sent. See `ppexec.measure.ping`.

    Parameters
    ----------
    rows : sequence of mappings
        What was measured for each size of one link: `size_bytes`, `occupied_s`, and, each a mapping with `median_s`,
        `p25_s` and `p75_s`: `asleep_s`, `awake_s`, `late_s`, `send_s` and `post_s`.
    link : Link
        What was fitted to it.
    name : str
        The link's name, for the axis.
    """
    sizes = [row["size_bytes"] for row in rows]
    dense = np.unique(np.geomspace(min(sizes), max(sizes), 600).astype(int)).tolist()
    # Both sides of each jump between the fit's pieces.
    jumps = [piece.from_bytes for piece in link.larger if min(sizes) < piece.from_bytes <= max(sizes)]
    dense = sorted({*dense, *jumps, *(jump - 1 for jump in jumps)})
    picture = make_subplots(cols=2, horizontal_spacing=0.09, shared_yaxes=True)
    for column, quantities in enumerate(_SHOWN, start=1):
        colours = [series_colour(3 * (column - 1) + number) for number in range(len(quantities))]
        for (quantity, label), colour in zip(quantities.items(), colours, strict=True):
            picture.add_scatter(**_points(rows, quantity, colour), x=sizes, name=label, row=1, col=column)
        fit, label = [(link.one_way_s, "to a sleeping receiver, fit"), (link.occupied_s, "each further, fit")][
            column - 1
        ]
        picture.add_scatter(
            x=dense,
            y=[fit(size) * 1e6 for size in dense],
            mode="lines",
            line={"color": colours[0], "width": 2},
            name=label,
            row=1,
            col=column,
        )
    picture.update_layout(layout(height=460, title=None, bottom=60, entries=8))
    ticks = [size for size in (64 << (3 * power) for power in range(9)) if min(sizes) <= size <= max(sizes)] or sizes
    picture.update_xaxes(
        title_text="size of the message",
        type="log",
        tickvals=ticks,
        ticktext=[bytes_text(size) for size in ticks],
        tickangle=0,
        gridcolor=GRID,
    )
    picture.update_yaxes(type="log", dtick=1, exponentformat="none", showticklabels=True, gridcolor=GRID)
    picture.update_yaxes(title_text=f"{name} [µs]", col=1)
    return picture


def _points(rows: Sequence[Mapping[str, Any]], quantity: str, colour: str) -> dict[str, Any]:
    """Medians as markers with quartiles as bars, in µs."""
    marker = {"symbol": "circle-open", "size": 8, "color": colour, "line": {"width": 2}}
    if quantity == "occupied":
        return {"y": [row["occupied_s"] * 1e6 for row in rows], "mode": "markers", "marker": marker}
    spreads = [row[f"{quantity}_s"] for row in rows]
    return {
        "y": [spread["median_s"] * 1e6 for spread in spreads],
        "mode": "markers",
        "marker": marker,
        "error_y": {
            "array": [(spread["p75_s"] - spread["median_s"]) * 1e6 for spread in spreads],
            "arrayminus": [(spread["median_s"] - spread["p25_s"]) * 1e6 for spread in spreads],
            "color": colour,
            "thickness": 1,
            "width": 2,
        },
    }
