"""Memory of a step: the most that each rank holds, of each kind of memory and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program

if TYPE_CHECKING:
    import pandas

Bytes = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The most that each rank holds of each kind, arrays of shape (p,); None where it is not known.

    Parameters
    ----------
    activation_bytes
        Activations; see `StageCost`.
    receive_buffer_bytes
        Buffers of receives posted and not yet used. A received buffer is the stage's input: an activation, from F on.
    send_buffer_bytes
        What was handed over and has not left yet, as far as no activation holds it anyway: gradients, and in an
        evaluation outputs.
    parameter_bytes
        Parameters.
    gradient_bytes
        The parameters' gradients, from a stage's first B or W to the end of the step.
    optimizer_bytes
        The optimizer's state.
    unsharded_bytes
        Parameters gathered from all replicas, beside the rank's share of them, which is in `parameter_bytes`.
    other_bytes
        What a rank holds all the time besides, not told apart.
    host_bytes
        Activations in the host's memory, which is no part of the total.
    total_bytes
        The largest sum of all known kinds at one time. It may be less than the sum of their peaks. Where only the most
        in all was measured, that; None where nothing is known.

    Notes
    -----
    All are levels between computations. What a kernel needs while it runs is not in them.
    """

    activation_bytes: Bytes | None
    receive_buffer_bytes: Bytes | None
    send_buffer_bytes: Bytes | None
    parameter_bytes: Bytes | None
    gradient_bytes: Bytes | None
    optimizer_bytes: Bytes | None
    unsharded_bytes: Bytes | None
    other_bytes: Bytes | None
    total_bytes: Bytes | None
    host_bytes: Bytes | None

    @classmethod
    def of(
        cls,
        program: Program,
        levels: Mapping[str, Bytes],
        constant: Mapping[str, Bytes],
        measured_total: Bytes | None = None,
        *,
        host_bytes: Bytes | None = None,
    ) -> Memory:
        """The peaks of what changes during a step and of what does not.

        Parameters
        ----------
        program : Program
            What ran.
        levels : mapping from a field's name to an array of shape (rows,)
            What the row's rank holds once the row has taken effect, of each known kind that changes.
        constant : mapping from a field's name to an array of shape (p,)
            What each rank holds all the time, of each known kind.
        measured_total : array of shape (p,), optional
            The most in all, where it was measured as such.
        host_bytes : array of shape (rows,), optional
            What its activations take in host memory.
        """
        total = measured_total
        if total is None and (levels or constant):
            total = peak_per_rank(program, _sum(program, levels)) + sum(constant.values())
        peaks = {name: peak_per_rank(program, level) for name, level in levels.items()}
        if host_bytes is not None:
            peaks["host_bytes"] = peak_per_rank(program, host_bytes)
        unknown = {field.name: None for field in fields(cls)}
        return cls(**(unknown | peaks | dict(constant) | {"total_bytes": total}))

    def to_dict(self) -> dict[str, list[int]]:
        """Known kinds as lists by rank."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column.tolist() for name, column in columns.items() if column is not None}

    def to_frame(self) -> pandas.DataFrame:
        """A pandas DataFrame with one row per rank and one column for each known kind."""
        import pandas

        return pandas.DataFrame(self.to_dict()).rename_axis("rank")


def peak_per_rank(program: Program, levels: Bytes) -> Bytes:
    """The largest level on each rank.

    Parameters
    ----------
    program : Program
        What ran.
    levels : array of shape (rows,)
        Bytes that the row's rank holds once the row has taken effect.

    Returns
    -------
    array of shape (p,)
        Bytes; 0 for a rank without actions.
    """
    peak = np.zeros(program.ranks, np.int64)
    np.maximum.at(peak, program.rank, levels)
    return peak


def levels_at_peak(program: Program, levels: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """What each rank holds of each kind when it first holds the most of all kinds together.

    Parameters
    ----------
    program : Program
        What ran.
    levels : mapping from a kind's name to an array of shape (rows,)
        As in `Memory.of`.

    Returns
    -------
    dict from a kind's name to an array of shape (p,)
        Bytes.
    """
    total = _sum(program, levels)
    found = {name: np.zeros(program.ranks, np.int64) for name in levels}
    for rank in range(program.ranks):
        rows = program.rows_of(rank)
        if len(rows):
            row = rows.start + int(np.argmax(total[rows.start : rows.stop]))
            for name, level in levels.items():
                found[name][rank] = level[row]
    return found


def _sum(program: Program, levels: Mapping[str, Bytes]) -> Bytes:
    return sum(levels.values(), np.zeros(len(program.stage), np.int64))


def sending_levels(
    program: Program, *, end_s: Seconds, effect_s: Seconds, message_left_s: Seconds, message_bytes: Bytes
) -> Bytes:
    """Bytes that a row's rank has handed over and that have not left when the row takes effect, shape (rows,).

    A message is handed over when its producer's action ends. Outputs count in an evaluation alone: in training they
    are activations.

    Parameters
    ----------
    program : Program
        What ran.
    end_s, effect_s : arrays of shape (rows,)
        When each row ended, and when its change of memory took effect.
    message_left_s, message_bytes : arrays of shape (messages,)
        When each message had left, and its size.
    """
    messages = program.messages
    counts = np.full(len(messages), True)
    if not program.schedule.is_forward_only:
        counts = program.kind[messages.producer] != Kind.F
    held = np.zeros(len(program.stage), np.int64)
    last_row = (program.action_start[1:] - 1)[program.row_action]
    handed_s = end_s[last_row[messages.producer]]
    # On a real clock a message may be seen complete before its producer's end is noted; it then counts at no time.
    left_s = np.maximum(message_left_s, handed_s)
    for rank in np.unique(messages.source[counts]).tolist():
        rows = program.rows_of(rank)
        inside, chosen = slice(rows.start, rows.stop), np.flatnonzero(counts & (messages.source == rank))
        sizes, moments_s = message_bytes[chosen], effect_s[inside]
        held[inside] = _sum_until(handed_s[chosen], sizes, moments_s) - _sum_until(left_s[chosen], sizes, moments_s)
    return held


def _sum_until(times_s: Seconds, sizes: Bytes, until_s: Seconds) -> Bytes:
    """The sum of the sizes whose time is not after `until_s`, for each of these."""
    order = np.argsort(times_s, kind="stable")
    total = np.concatenate([[0], np.cumsum(sizes[order])])
    return total[np.searchsorted(times_s[order], until_s, side="right")]
