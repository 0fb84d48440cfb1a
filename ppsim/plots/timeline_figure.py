"""Timeline: who computed what, when; several traces one above the other on one time axis."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from ppsim.errors import InputError
from ppsim.plots import style
from ppsim.plots.critical_line import critical_lines
from ppsim.plots.spread_lines import spread_lines
from ppsim.plots.units import Unit, bytes_text, time_unit
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble

_BAR = 0.86  # of a lane's height
_STRIP = 0.26  # likewise, of a reduction's, at the lower edge of the bars
_HEADER = 1.4  # lanes that a block's title takes
_LETTERED_BARS = 4000  # up to here every bar carries its number and the browser hides what does not fit
_NOMINAL_WIDTH_PX = 1000  # beyond, numbers are left out of bars that are too narrow on a plot of this width
_LEGIBLE_PX = 12


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A trace in the figure: its lanes are y = top, top + 1, ... one per rank."""

    name: str
    trace: Trace
    top: float

    @property
    def lanes(self) -> npt.NDArray[np.float64]:
        return self.top + np.arange(self.trace.ranks, dtype=np.float64)

    @property
    def origin_s(self) -> float:
        return float(self.trace.start_s.min())


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
    strips at the lower edge of a lane are sums of gradients over replicas, which run beside computations. Above each
    block stand its makespan and bubble.

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
    figure.add_trace(_bubbles(blocks, unit))
    figure.add_traces(_bars(blocks, unit, longest_s))
    figure.add_traces(_beside(blocks, unit))
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


def _stack(traces: dict[str, Trace]) -> tuple[list[_Block], float]:
    """The blocks from top to bottom, and the y below the last one; y counts lanes downwards from 0."""
    blocks: list[_Block] = []
    y = 0.0
    for name, trace in traces.items():
        y += _HEADER
        blocks.append(_Block(name=name, trace=trace, top=y + 0.5))
        y += trace.ranks
    return blocks, y + 0.1


def _lane_px(lanes: float) -> int:
    return 26 if lanes <= 14 else 21 if lanes <= 45 else 17


def _heading(block: _Block, unit: Unit) -> str:
    trace = block.trace
    text = f"<b>{html.escape(block.name)}</b>   {unit.text(trace.makespan_s)}, bubble {trace.bubble_fraction:.1%}"
    if trace.reduce_end_s is not None:
        text += f", {unit.text(trace.step_s)} with reductions"
    stages = _stages_per_rank(trace)
    return f"{text}, {stages} stages per rank (later ones lighter)" if stages > 1 else text


def _stages_per_rank(trace: Trace) -> int:
    return int(np.bincount(np.asarray(trace.schedule.placement)).max())


def _chunk_of_stage(trace: Trace) -> npt.NDArray[np.int64]:
    """For each stage, how many earlier stages its rank holds, shape (stages,)."""
    held = [0] * trace.ranks
    chunks = []
    for rank in trace.schedule.placement:
        chunks.append(held[rank])
        held[rank] += 1
    return np.array(chunks)


def _bubbles(blocks: list[_Block], unit: Unit) -> go.Bar:
    """A grey bar behind each lane, as long as the step."""
    return go.Bar(
        name="bubble",
        legendrank=2000,
        orientation="h",
        y=np.concatenate([block.lanes for block in blocks]),
        x=np.concatenate([np.full(block.trace.ranks, block.trace.makespan_s * unit.scale) for block in blocks]),
        width=_BAR,
        marker={"color": style.BUBBLE},
        hoverinfo="skip",
    )


def _bars(blocks: list[_Block], unit: Unit, longest_s: float) -> list[go.Bar]:
    """One go.Bar per kind and shade, over all blocks: a few thousand bars must stay a few objects."""
    total = sum(len(block.trace.start_s) for block in blocks)
    most = max(_stages_per_rank(block.trace) for block in blocks)
    narrowest_s = 0.0 if total <= _LETTERED_BARS else longest_s * _LEGIBLE_PX / _NOMINAL_WIDTH_PX
    dense = total / sum(block.trace.ranks for block in blocks) > 100
    hovers = [_hover(block, unit) for block in blocks]
    bars = []
    for kind, colour in style.KIND_COLOURS.items():
        shown = False
        for chunk in range(most):
            y, base, x, text, hover = [], [], [], [], []
            for block, labels in zip(blocks, hovers, strict=True):
                trace, program = block.trace, block.trace.program
                rows = np.flatnonzero((program.kind == kind) & (_chunk_of_stage(trace)[program.stage] == chunk))
                lengths_s = trace.end_s[rows] - trace.start_s[rows]
                y.append(block.top + program.rank[rows])
                base.append((trace.start_s[rows] - block.origin_s) * unit.scale)
                x.append(lengths_s * unit.scale)
                numbers = zip(program.microbatch[rows].tolist(), lengths_s.tolist(), strict=True)
                digits = len(str(trace.schedule.microbatches - 1))
                text += [_number(number, digits) if length_s >= narrowest_s else "" for number, length_s in numbers]
                hover += [labels[row] for row in rows.tolist()]
            if not text:
                continue
            shade = style.lighter(colour, 0.5 * chunk / max(most - 1, 1))
            bars.append(
                go.Bar(
                    name=style.KIND_NAMES[kind],
                    legendgroup=kind.name,
                    showlegend=not shown,
                    orientation="h",
                    y=np.concatenate(y),
                    base=np.concatenate(base),
                    x=np.concatenate(x),
                    width=_BAR,
                    marker={"color": shade, "line": {"color": "#ffffff", "width": 0.2 if dense else 0.8}},
                    text=text,
                    textposition="inside",
                    insidetextanchor="middle",
                    textangle=0,
                    textfont={"color": style.ink_on(shade), "size": 11},
                    hovertext=hover,
                    hovertemplate="%{hovertext}<extra></extra>",
                )
            )
            shown = True
    return bars


class _Strip(NamedTuple):
    """How one kind of work beside computations is drawn: in the legend, where in its lane, and what it does."""

    name: str
    colour: str
    offset: float  # from the middle of the lane
    did: str  # with its bytes


_STRIPS = {
    Kind.REDUCE_GRAD: _Strip(
        "reduction over replicas", style.REDUCTION, (_BAR - _STRIP) / 2, "adds up {} of gradients over the replicas"
    ),
    Kind.UNSHARD: _Strip(
        "gathering of parameters", style.GATHERING, (_STRIP - _BAR) / 2, "gathers {} of parameters from the replicas"
    ),
    Kind.O: _Strip("offloading", style.OFFLOADING, -_STRIP / 2, "moves {} of activations to host memory"),
    Kind.L: _Strip("loading", style.LOADING, _STRIP / 2, "moves {} of activations from host memory"),
}


def _beside(blocks: list[_Block], unit: Unit) -> list[go.Bar]:
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


def _number(number: int, digits: int) -> str:
    """A microbatch's number, padded on both sides with half a digit per missing digit.

    So the browser shows or hides 9 and 10 alike, and a lane is not lettered up to 9 only.
    """
    half_digits = "\u2005" * (digits - len(str(number)))
    return f"{half_digits}{number}{half_digits}"


def _hover(block: _Block, unit: Unit) -> list[str]:
    """What the pointer tells of each row: the action, when, how long, what the rank holds, what it got and sent."""
    trace, program = block.trace, block.trace.program
    messages = program.messages
    parts = np.diff(program.action_start)[program.row_action]
    result = []
    for row in range(len(trace.start_s)):
        begin_s, end_s = float(trace.start_s[row]), float(trace.end_s[row])
        overlapped = ", half of an overlapped pair" if parts[row] == 2 else ""
        lines = [
            f"<b>{program.action_of(row)}</b> on rank {program.rank[row]}{overlapped}",
            f"starts {unit.text(begin_s - block.origin_s)}, takes {unit.text(end_s - begin_s)}",
        ]
        if trace.activation_bytes is not None:
            lines.append(f"rank then holds {bytes_text(int(trace.activation_bytes[row]))} of activations")
        got, sent = int(program.message_in[row]), int(program.message_out[row])
        if got >= 0:
            lines.append(f"received {_size_text(trace, got)}from rank {messages.source[got]}")
        if sent >= 0:
            lines.append(f"sends {_size_text(trace, sent)}to rank {messages.destination[sent]}")
        result.append("<br>".join(lines))
    return result


def _size_text(trace: Trace, message: int) -> str:
    return "" if trace.message_bytes is None else f"{bytes_text(int(trace.message_bytes[message]))} "


def _messages(blocks: list[_Block], unit: Unit) -> go.Scatter:
    """All messages as one broken line: from the edge of the sender's bar to the facing edge of the receiver's."""
    x, y = [], []
    for block in blocks:
        trace, table = block.trace, block.trace.program.messages
        if trace.message_times_s is None:
            continue
        start_s, _, arrival_s = trace.message_times_s
        begin = (start_s - block.origin_s) * unit.scale
        end = (arrival_s - block.origin_s) * unit.scale
        edge = np.sign(table.destination - table.source) * _BAR / 2
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
