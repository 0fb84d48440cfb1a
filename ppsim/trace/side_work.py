"""Side work: what ranks did beside their computations: gradients, parameters and activations on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Action, Kind

if TYPE_CHECKING:
    from ppsim.trace.trace import Trace

_Integers = npt.NDArray[np.integer]
_Seconds = npt.NDArray[np.float64]


class SideWork(NamedTuple):
    """What ran beside computations, as columns.

    Parameters
    ----------
    rank, stage, kind, microbatch : arrays of shape (entries,)
        REDUCE_GRAD of each stage, each UNSHARD, and each O and L, in this sequence. Where it is of a whole stage, the
        microbatch is -1.
    start_s, end_s : arrays of shape (entries,)
        When it ran.
    size_bytes : array of shape (entries,)
        What it added up, gathered or moved.
    """

    rank: _Integers
    stage: _Integers
    kind: _Integers
    microbatch: _Integers
    start_s: _Seconds
    end_s: _Seconds
    size_bytes: _Integers

    @classmethod
    def of(cls, trace: Trace) -> SideWork:
        """All that a trace knows of."""
        nothing, no_time = np.zeros(0, np.int64), np.zeros(0)
        parts = [cls(nothing, nothing, nothing, nothing, no_time, no_time, nothing)]
        if trace.reduce_start_s is not None and trace.reduce_end_s is not None and trace.reduce_bytes is not None:
            rank = np.asarray(trace.schedule.placement)
            kind, of_all = np.full(len(rank), Kind.REDUCE_GRAD), np.full(len(rank), -1)
            times = trace.reduce_start_s, trace.reduce_end_s, trace.reduce_bytes
            parts.append(cls(rank, np.arange(len(rank)), kind, of_all, *times))
        if trace.unshard_start_s is not None and trace.unshard_end_s is not None and trace.unshard_bytes is not None:
            table = trace.program.collectives
            own = table.kind == Kind.UNSHARD
            cells = table.rank[own], table.stage[own], table.kind[own], table.microbatch[own]
            parts.append(cls(*cells, trace.unshard_start_s, trace.unshard_end_s, trace.unshard_bytes))
        if trace.copy_start_s is not None and trace.copy_end_s is not None and trace.copy_bytes is not None:
            table = trace.program.offload
            times = trace.copy_start_s, trace.copy_end_s, trace.copy_bytes
            parts.append(cls(table.rank, table.stage, table.kind, table.microbatch, *times))
        return cls._make(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def where(self, is_kept: npt.NDArray[np.bool_]) -> SideWork:
        """Only those entries."""
        return SideWork._make(column[is_kept] for column in self)

    def actions(self) -> list[Action]:
        """Each entry as a schedule spells it: 2O3, 1UNSHARD."""
        columns = self.stage.tolist(), self.kind.tolist(), self.microbatch.tolist()
        return [
            Action(stage, Kind(kind), None if microbatch < 0 else microbatch)
            for stage, kind, microbatch in zip(*columns, strict=True)
        ]
