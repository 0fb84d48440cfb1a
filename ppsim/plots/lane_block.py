"""Lane block: a trace in a timeline, with a lane for each rank, and what is said of its actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.plots import style
from ppsim.plots.units import Unit, bytes_text
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

BAR = 0.86
"""How high a bar is, of its lane."""


@dataclass(frozen=True, kw_only=True)
class Block:
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


def stages_per_rank(trace: Trace) -> int:
    return int(np.bincount(np.asarray(trace.schedule.placement)).max())


def chunk_of_stage(trace: Trace) -> npt.NDArray[np.int64]:
    """For each stage, how many earlier stages its rank holds, shape (stages,)."""
    held = [0] * trace.ranks
    chunks = []
    for rank in trace.schedule.placement:
        chunks.append(held[rank])
        held[rank] += 1
    return np.array(chunks)


def shade(kind: Kind, chunk: int, chunks: int) -> str:
    """The colour of a kind on a rank's stage number `chunk` of so many: lighter, the later the stage."""
    return style.lighter(style.KIND_COLOURS[kind], 0.5 * chunk / max(chunks - 1, 1))


def hover_texts(block: Block, unit: Unit) -> list[str]:
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
