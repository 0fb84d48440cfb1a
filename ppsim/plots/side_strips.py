"""Side strips: what runs beside computations, drawn into the lanes of a timeline."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from ppsim.plots import style
from ppsim.plots.lane_block import BAR, Block
from ppsim.plots.units import Unit, bytes_text
from ppsim.schedule.action import Kind

_STRIP = 0.26  # of a lane's height


class _Strip(NamedTuple):
    """How one kind of work beside computations is drawn: in the legend, where in its lane, and what it does."""

    name: str
    colour: str
    offset: float  # from the middle of the lane
    did: str  # with its bytes


_STRIPS = {
    Kind.REDUCE_GRAD: _Strip(
        "reduction over replicas", style.REDUCTION, (BAR - _STRIP) / 2, "adds up {} of gradients over the replicas"
    ),
    Kind.UNSHARD: _Strip(
        "gathering of parameters", style.GATHERING, (_STRIP - BAR) / 2, "gathers {} of parameters from the replicas"
    ),
    Kind.O: _Strip("offloading", style.OFFLOADING, -_STRIP / 2, "moves {} of activations to host memory"),
    Kind.L: _Strip("loading", style.LOADING, _STRIP / 2, "moves {} of activations from host memory"),
}


def side_strips(blocks: list[Block], unit: Unit) -> list[go.Bar]:
    """What runs beside computations, as thin bars on the lanes of ranks; no bar at all of what no trace has."""
    bars = []
    for kind, strip in _STRIPS.items():
        y, base, x, hover = [], [], [], []
        for block in blocks:
            found = block.trace.side_work.where(block.trace.side_work.kind == kind)
            start_s = found.start_s - block.origin_s
            length_s = found.end_s - found.start_s
            y.append(block.top + found.rank + strip.offset)
            base.append(start_s * unit.scale)
            x.append(length_s * unit.scale)
            columns = (found.rank, start_s, length_s, found.size_bytes)
            rows = zip(found.actions(), *(column.tolist() for column in columns), strict=True)
            hover += [
                f"<b>{action}</b> on rank {rank}<br>starts {unit.text(start)}, takes {unit.text(length)}<br>"
                f"{strip.did.format(bytes_text(size_bytes))}"
                for action, rank, start, length, size_bytes in rows
            ]
        if hover:
            fill = {"shape": "/", "bgcolor": strip.colour, "fgcolor": "#ffffff", "size": 4, "solidity": 0.3}
            bars.append(
                go.Bar(
                    name=strip.name,
                    legendrank=1999,
                    orientation="h",
                    y=np.concatenate(y),
                    base=np.concatenate(base),
                    x=np.concatenate(x),
                    width=_STRIP,
                    marker={"color": strip.colour, "line": {"color": "#ffffff", "width": 0.5}, "pattern": fill},
                    hovertext=hover,
                    hovertemplate="%{hovertext}<extra></extra>",
                )
            )
    return bars
