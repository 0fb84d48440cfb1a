"""Memory columns: all that each rank of a trace holds, side by side."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.simulation.memory_levels import peak_per_rank

if TYPE_CHECKING:
    import pandas

    from ppsim.trace.trace import Trace

Bytes = npt.NDArray[np.int64]
_COUNTED = {"activation_bytes": "activations", "receive_buffer_bytes": "receive buffers", "gradient_bytes": "gradients"}
_STATIC = ("parameter_bytes", "optimizer_bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The largest that each rank holds of every column, shape (p,) each; None where it is not known.

    activation_bytes: see `StageCost`. receive_buffer_bytes: receives posted and not yet used; a received buffer is the
    stage's input, an activation, from its F on. send_buffer_bytes: what has been handed over and has not left yet, as
    far as no activation holds it anyway: gradients, and in an evaluation outputs. gradient_bytes: of the parameters,
    from a stage's first B or W to the end of the step. optimizer_bytes: its state. total_bytes: the largest sum of all
    known columns at one time, which may be less than the sum of their peaks.
    All are levels after an action; what a kernel needs in between is not in them.
    """

    activation_bytes: Bytes
    receive_buffer_bytes: Bytes | None
    send_buffer_bytes: Bytes
    parameter_bytes: Bytes | None
    gradient_bytes: Bytes | None
    optimizer_bytes: Bytes | None
    total_bytes: Bytes

    @classmethod
    def of(cls, trace: Trace) -> Memory:
        """The columns of a trace."""
        levels = _levels(trace)
        peaks = {name: peak_per_rank(trace.program, each) for name, each in levels.items()}
        static = {name: getattr(trace, name) for name in _STATIC}
        total = peak_per_rank(trace.program, sum(levels.values(), np.zeros(len(trace.start_s), np.int64)))
        for each in static.values():
            total = total if each is None else total + each
        return cls(
            activation_bytes=peaks["activation_bytes"],
            receive_buffer_bytes=peaks.get("receive_buffer_bytes"),
            send_buffer_bytes=peaks["send_buffer_bytes"],
            gradient_bytes=peaks.get("gradient_bytes"),
            total_bytes=total,
            **static,
        )

    def to_dict(self) -> dict[str, list[int]]:
        """Known columns as lists by rank."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column.tolist() for name, column in columns.items() if column is not None}

    def to_frame(self) -> pandas.DataFrame:
        """One row per rank, one column for each that is known."""
        import pandas

        return pandas.DataFrame(self.to_dict()).rename_axis("rank")


def held_at_peak(trace: Trace) -> dict[str, Bytes]:
    """Every known column when a rank's total is the largest, for the first time; shape (p,) each. They add up to it."""
    levels = _levels(trace)
    total = sum(levels.values(), np.zeros(len(trace.start_s), np.int64))
    found = {name: np.zeros(trace.ranks, np.int64) for name in levels}
    for rank in range(trace.ranks):
        rows = trace.program.rows_of(rank)
        if len(rows):
            row = rows.start + int(np.argmax(total[rows.start : rows.stop]))
            for name, each in levels.items():
                found[name][rank] = each[row]
    known = {name: getattr(trace, name) for name in _STATIC}
    return found | {name: each for name, each in known.items() if each is not None}


def _levels(trace: Trace) -> dict[str, Bytes]:
    """The known columns that change, shape (rows,) each."""
    levels = {name: getattr(trace, name) for name in _COUNTED}
    levels["send_buffer_bytes"] = sending_levels(trace)
    return {name: each for name, each in levels.items() if each is not None}


def sending_levels(trace: Trace) -> Bytes:
    """Bytes handed over and not yet gone when a row's action has taken effect, shape (rows,), by the trace's times.

    A message is handed over when its producer ends. Outputs count in an evaluation alone: else they are activations.
    """
    program, messages = trace.program, trace.program.messages
    counts = np.full(len(messages), True)
    if not program.schedule.is_forward_only:
        counts = program.kind[messages.producer] != Kind.F
    held = np.zeros(len(program.stage), np.int64)
    last_row = (program.action_start[1:] - 1)[program.row_action]
    handed_s, effect_s = trace.end_s[last_row[messages.producer]], trace.effect_s
    for rank in np.unique(messages.source[counts]).tolist():
        rows = program.rows_of(rank)
        inside, chosen = slice(rows.start, rows.stop), np.flatnonzero(counts & (messages.source == rank))
        begun = _sum_until(handed_s[chosen], trace.message_bytes[chosen], effect_s[inside])
        held[inside] = begun - _sum_until(
            np.maximum(trace.message_left_s, handed_s)[chosen], trace.message_bytes[chosen], effect_s[inside]
        )
    return held


def _sum_until(times_s: npt.NDArray[np.float64], sizes: Bytes, until_s: npt.NDArray[np.float64]) -> Bytes:
    """The sum of the sizes whose time is not after `until_s`."""
    order = np.argsort(times_s, kind="stable")
    total = np.concatenate([[0], np.cumsum(sizes[order])])
    return total[np.searchsorted(times_s[order], until_s, side="right")]


def first_difference(predicted: Trace, measured: Trace) -> dict[str, Any] | None:
    """Where two traces of one program first hold different bytes; None if they are equal wherever both know.

    Compared are activations, receive buffers and gradients after every action, and parameters. Unfinished sends are
    not: when a message has left is a matter of time. Keys: column, rank, action (None for parameters), predicted,
    measured.
    """
    program = predicted.program
    for name, column in _COUNTED.items():
        ours, theirs = getattr(predicted, name), getattr(measured, name)
        if ours is None or theirs is None:
            continue
        rows = np.flatnonzero(ours != theirs)
        if len(rows):
            row = int(rows[0])
            return {
                "column": column,
                "rank": int(program.rank[row]),
                "action": str(program.action_of(row)),
                "predicted": int(ours[row]),
                "measured": int(theirs[row]),
            }
    if predicted.parameter_bytes is not None and measured.parameter_bytes is not None:
        for rank in np.flatnonzero(predicted.parameter_bytes != measured.parameter_bytes).tolist():
            return {
                "column": "parameters",
                "rank": rank,
                "action": None,
                "predicted": int(predicted.parameter_bytes[rank]),
                "measured": int(measured.parameter_bytes[rank]),
            }
    return None
