"""Timeline: who computed what, when; several traces one above the other on one time axis."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from ppsim.errors import InputError
from ppsim.plots import style
from ppsim.plots.critical_line import critical_lines
from ppsim.plots.lane_bars import lane_bars
from ppsim.plots.lane_block import BAR, Block, stages_per_rank
from ppsim.plots.lane_cells import lane_cells
from ppsim.plots.side_strips import side_strips
from ppsim.plots.spread_lines import spread_lines
from ppsim.plots.units import Unit, time_unit
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble

_HEADER = 1.4  # lanes that a block's title takes
_MOST_BARS = 4000  # beyond, a browser takes a second to draw them anew


def timeline(
    traces: Mapping[str, Trace],
    *,
    title: str | None = None,
    messages: bool = False,
    critical_path: bool = False,
    spreads: Mapping[str, Ensemble] | None = None,
) -> go.Figure:
    """Draw timelines one above the other on one time axis: a block for each trace, in it a lane for each rank.

    Each trace starts at 0. A bar has the colour of its kind, and the microbatch's number where that fits. An overlapped
    pair is drawn as its two parts. Where a rank holds several stages, later stages are lighter. Grey is bubble. Hatched
    strips in a lane are what runs beside computations: sums of gradients over replicas at its lower edge, gathered
    parameters at its upper edge, and activations moved to host memory and back in between. Above each block stand its
    makespan and bubble. More than some thousand actions are drawn as pictures, which stay fluid.

    Parameters
    ----------
    traces : mapping of str to Trace
        By title of the block.
    title : str
        Of the figure.
    messages : bool
        Whether to draw each message as a thin line, from the start of its transfer to its arrival. A trace that does
        not know its messages has no such lines.
    critical_path : bool
        Whether to draw each trace's critical path as a red line, dotted where an action waits although its inputs are
        there.
    spreads : mapping of str to Ensemble
        Samples of some traces' programs, by the traces' names. A bracket on each action shows when it starts in 90 % of
        them. Legible for some tens of actions on each rank.

    Raises
    ------
    InputError
        If there are no traces, or if samples are for a name or program that is not drawn.
    """
    blocks, bottom = _stack(style.named(traces))
    longest_s = max(block.trace.step_s for block in blocks)
    unit = time_unit(longest_s)
    lane_px = _lane_px(bottom)
    height = round(bottom * lane_px)

    figure = go.Figure(layout=style.layout(height=height, title=title))
    is_dense = sum(len(block.trace.start_s) for block in blocks) > _MOST_BARS
    figure.add_traces((lane_cells if is_dense else lane_bars)(blocks, unit))
    figure.add_traces(side_strips(blocks, unit))
    if messages:
        figure.add_trace(_messages(blocks, unit))
    if critical_path:
        figure.add_traces(critical_lines([(block.trace, block.top) for block in blocks], unit))
    if spreads:
        drawn = {block.name: block for block in blocks}
        unknown = next((name for name in spreads if name not in drawn), None)
        if unknown is not None:
            raise InputError(f"there are samples for {unknown!r}, but the traces are {', '.join(map(repr, drawn))}")
        figure.add_trace(
            spread_lines([(drawn[name].trace, drawn[name].top, each) for name, each in spreads.items()], unit)
        )
    for block in blocks:
        figure.add_annotation(
            text=_heading(block, unit),
            showarrow=False,
            x=0,
            xref="paper",
            xanchor="left",
            y=block.top - 0.5,
            yref="y",
            yanchor="bottom",
        )
    figure.update_layout(
        barmode="overlay",
        # The browser hides a number that does not fit at this size, and shows it again when one zooms in.
        uniformtext={"mode": "hide", "minsize": 9 if lane_px >= 18 else 8},
        xaxis={
            "title": {"text": f"time from the step's start [{unit.name}]", "standoff": style.AXIS_TITLE_GAP_PX},
            "range": [0, longest_s * unit.scale * 1.005 or 1],
            "gridcolor": style.GRID,
            "zeroline": False,
        },
        yaxis={
            "range": [bottom, 0],
            "tickvals": np.concatenate([block.lanes for block in blocks]).tolist(),
            "ticktext": [f"rank {rank}" for block in blocks for rank in range(block.trace.ranks)],
            "tickfont": {"size": min(12, lane_px - 4)},
            "ticklabelstandoff": 6,
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    )
    return figure


def _stack(traces: dict[str, Trace]) -> tuple[list[Block], float]:
    """The blocks from top to bottom, and the y below the last one; y counts lanes downwards from 0."""
    blocks: list[Block] = []
    y = 0.0
    for name, trace in traces.items():
        y += _HEADER
        blocks.append(Block(name=name, trace=trace, top=y + 0.5))
        y += trace.ranks
    return blocks, y + 0.1


def _lane_px(lanes: float) -> int:
    return 26 if lanes <= 14 else 21 if lanes <= 45 else 17


def _heading(block: Block, unit: Unit) -> str:
    trace = block.trace
    text = f"<b>{html.escape(block.name)}</b>   {unit.text(trace.makespan_s)}, bubble {trace.bubble_fraction:.1%}"
    if trace.reduce_end_s is not None:
        text += f", {unit.text(trace.step_s)} with reductions"
    stages = stages_per_rank(trace)
    return f"{text}, {stages} stages per rank (later ones lighter)" if stages > 1 else text


def _messages(blocks: list[Block], unit: Unit) -> go.Scatter:
    """All messages as one broken line: from the edge of the sender's bar to the facing edge of the receiver's."""
    x, y = [], []
    for block in blocks:
        trace, table = block.trace, block.trace.program.messages
        if trace.message_times_s is None:
            continue
        start_s, _, arrival_s = trace.message_times_s
        begin = (start_s - block.origin_s) * unit.scale
        end = (arrival_s - block.origin_s) * unit.scale
        edge = np.sign(table.destination - table.source) * BAR / 2
        gap = np.full(len(table), np.nan)
        x.append(np.stack([begin, end, gap], axis=1).reshape(-1))
        y.append(block.top + np.stack([table.source + edge, table.destination - edge, gap], axis=1).reshape(-1))
    return go.Scatter(
        name="message",
        legendrank=2001,
        x=np.concatenate(x) if x else [],
        y=np.concatenate(y) if y else [],
        mode="lines",
        line={"color": style.FAINT, "width": 1},
        hoverinfo="skip",
    )
