"""Lane bars: the actions of traces as bars with their microbatches' numbers, for up to some thousands."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ppsim.plots import style
from ppsim.plots.lane_block import BAR, Block, chunk_of_stage, hover_texts, shade, stages_per_rank
from ppsim.plots.units import Unit


def _bubbles(blocks: list[Block], unit: Unit) -> go.Bar:
    """A grey bar behind each lane, as long as the step."""
    return go.Bar(
        name="bubble",
        legendrank=2000,
        orientation="h",
        y=np.concatenate([block.lanes for block in blocks]),
        x=np.concatenate([np.full(block.trace.ranks, block.trace.makespan_s * unit.scale) for block in blocks]),
        width=BAR,
        marker={"color": style.BUBBLE},
        hoverinfo="skip",
    )


def lane_bars(blocks: list[Block], unit: Unit) -> list[go.Bar]:
    """The bubble, and over it one go.Bar per kind and shade, over all blocks: many bars must stay a few objects."""
    total = sum(len(block.trace.start_s) for block in blocks)
    most = max(stages_per_rank(block.trace) for block in blocks)
    dense = total / sum(block.trace.ranks for block in blocks) > 100
    hovers = [hover_texts(block, unit) for block in blocks]
    bars = [_bubbles(blocks, unit)]
    for kind in style.KIND_COLOURS:
        shown = False
        for chunk in range(most):
            y, base, x, text, hover = [], [], [], [], []
            for block, labels in zip(blocks, hovers, strict=True):
                trace, program = block.trace, block.trace.program
                rows = np.flatnonzero((program.kind == kind) & (chunk_of_stage(trace)[program.stage] == chunk))
                lengths_s = trace.end_s[rows] - trace.start_s[rows]
                y.append(block.top + program.rank[rows])
                base.append((trace.start_s[rows] - block.origin_s) * unit.scale)
                x.append(lengths_s * unit.scale)
                digits = len(str(trace.schedule.microbatches - 1))
                text += [_number(number, digits) for number in program.microbatch[rows].tolist()]
                hover += [labels[row] for row in rows.tolist()]
            if not text:
                continue
            colour = shade(kind, chunk, most)
            bars.append(
                go.Bar(
                    name=style.KIND_NAMES[kind],
                    legendgroup=kind.name,
                    showlegend=not shown,
                    orientation="h",
                    y=np.concatenate(y),
                    base=np.concatenate(base),
                    x=np.concatenate(x),
                    width=BAR,
                    marker={"color": colour, "line": {"color": "#ffffff", "width": 0.2 if dense else 0.8}},
                    text=text,
                    textposition="inside",
                    insidetextanchor="middle",
                    textangle=0,
                    textfont={"color": style.ink_on(colour), "size": 11},
                    hovertext=hover,
                    hovertemplate="%{hovertext}<extra></extra>",
                )
            )
            shown = True
    return bars


def _number(number: int, digits: int) -> str:
    """A microbatch's number, padded on both sides with half a digit per missing digit.

    So the browser shows or hides 9 and 10 alike, and a lane is not lettered up to 9 only.
    """
    half_digits = "\u2005" * (digits - len(str(number)))
    return f"{half_digits}{number}{half_digits}"
