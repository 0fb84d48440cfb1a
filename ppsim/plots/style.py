"""Style: the layout that all figures share, and how the colours of `ppsim.palette` are used in them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ppsim.errors import InputError
from ppsim.palette import CRITICAL as CRITICAL
from ppsim.palette import GATHERING as GATHERING
from ppsim.palette import KIND_COLOURS as KIND_COLOURS
from ppsim.palette import KIND_NAMES as KIND_NAMES
from ppsim.palette import LOADING as LOADING
from ppsim.palette import OFFLOADING as OFFLOADING
from ppsim.palette import PART_COLOURS as PART_COLOURS
from ppsim.palette import REDUCTION as REDUCTION
from ppsim.palette import SERIES_COLOURS as SERIES_COLOURS
from ppsim.trace.trace import Trace

# Half transparent greys, so that they suit a light page and a dark one.
AXIS_TITLE_GAP_PX = 6
GRID = "rgba(128, 128, 128, 0.25)"
BUBBLE = "rgba(128, 128, 128, 0.15)"
BAND = "rgba(128, 128, 128, 0.2)"  # of uncertainty
FAINT = "rgba(128, 128, 128, 0.8)"
_INK = "#1f2933"
ENTRIES_ABOVE = 4
_ENTRY_PX = 30  # height of a line of the legend


def series_colour(index: int) -> str:
    """The colour of the trace with that index; the colours repeat after eight traces, see `series_round`."""
    return SERIES_COLOURS[index % len(SERIES_COLOURS)]


def series_round(index: int) -> int:
    """How often all colours are used up before that trace: what else must differ from there on."""
    return index // len(SERIES_COLOURS)


def lighter(colour: str, share: float) -> str:
    """A `#rrggbb` colour mixed with white; share 0 leaves it, 1 gives white."""
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in _parts(colour))


def ink_on(colour: str) -> str:
    """Black or white: what is legible on a `#rrggbb` colour."""
    linear = [(part / 255) ** 2.2 for part in _parts(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.19 else "#ffffff"


def _parts(colour: str) -> list[int]:
    return [int(colour[index : index + 2], 16) for index in (1, 3, 5)]


def named(traces: Mapping[str, Trace]) -> dict[str, Trace]:
    """The traces to draw; raises InputError if there are none."""
    if not traces:
        raise InputError('there is no trace to draw: give at least one by name, as in {"predicted": trace}')
    return dict(traces)


def names_below(names: Sequence[str], bars: int) -> tuple[dict[str, Any], int]:
    """How the names of traces stand below bars that are grouped by rank.

    They are level where they have room, else upright. Beyond 60 bars there are none.

    Parameters
    ----------
    names : sequence of str
        The names, of which each bar has one.
    bars : int
        How many bars stand side by side.

    Returns
    -------
    axis : dict
        Of the figure's xaxis.
    bottom : int
        The margin below the axis, in pixels.
    """
    longest_px = 6 * max(map(len, names))  # about, at the font's size
    if bars > 60:
        return {"showticklabels": False}, 30
    if longest_px > 800 / bars:  # pages are some 800 pixels wide between the margins
        return {"tickangle": -90}, 40 + longest_px
    return {"tickangle": 0}, 56


def layout(*, height: int, title: str | None, top: int = 40, bottom: int = 44, entries: int = 0) -> go.Layout:
    """The layout that figures start from: white, without frame.

    Parameters
    ----------
    height : int
        Pixels of the plot; more where a legend beside it would not fit.
    title : str
        Of the figure.
    top, bottom : int
        Margins in pixels, without the title's.
    entries : int
        Number of entries in the legend. It stands above the plot, or beside it if it has too many.
    """
    if entries > ENTRIES_ABOVE:
        height = max(height, _ENTRY_PX * entries)
    above = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + (top - 30) / height, "yanchor": "bottom"}
    beside = {"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"}
    top += 34 if title else 0
    return go.Layout(
        template="none",
        height=height + top + bottom,
        margin={"l": 70, "r": 20, "t": top, "b": bottom},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        font={"family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 12, "color": _INK},
        title={
            "text": html.escape(title),
            "x": 0,
            "xref": "paper",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 12},
        }
        if title
        else None,
        legend=above if entries <= ENTRIES_ABOVE else beside,
        modebar={"bgcolor": "rgba(0, 0, 0, 0)", "color": FAINT, "activecolor": "#888888"},
        hoverlabel={"align": "left"},
        hovermode="closest",
    )
