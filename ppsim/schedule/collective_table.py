"""Collective table: the UNSHARDs and REDUCE_GRADs of a program, as each rank's stream runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppsim.schedule.action import Kind
from ppsim.schedule.program_tables import Integers, ProgramTables
from ppsim.schedule.sharding import Sharding


class CollectiveTable(NamedTuple):
    """What runs on the collective streams, rank after rank.

    It is a tuple because compiled passes take it as it is.

    Parameters
    ----------
    stage, kind, rank : arrays of shape (collectives,)
        UNSHARD or REDUCE_GRAD of which stage, and who runs it.
    before : array of shape (actions + p, 2)
        The collectives begin to end that stand right before each action, and, from entry `actions` on, after the last
        of each rank.
    gather : array of shape (rows,)
        The UNSHARD that makes a row's stage whole; -1 for none.
    """

    stage: Integers
    kind: Integers
    rank: Integers
    before: Integers
    gather: Integers

    @classmethod
    def none(cls) -> CollectiveTable:
        """No collectives, of a program without sharding."""
        nothing = np.zeros(0, np.int64)
        return cls(stage=nothing, kind=nothing, rank=nothing, before=np.zeros((0, 2), np.int64), gather=nothing)

    @classmethod
    def of(cls, program: ProgramTables, sharding: Sequence[Sharding]) -> CollectiveTable:
        """The table of a program's sharding."""
        runs = [entries.kind != Kind.RESHARD for entries in sharding]
        stage, kind, place = (
            np.concatenate([getattr(entries, name)[kept] for entries, kept in zip(sharding, runs, strict=True)])
            for name in ("stage", "kind", "before")
        )
        ends = np.cumsum([kept.sum() for kept in runs])
        rank = np.repeat(np.arange(program.ranks), np.diff(ends, prepend=0))
        before = np.empty((program.actions + program.ranks, 2), np.int64)
        for each, end in enumerate(ends.tolist()):
            begin = end - int(runs[each].sum())
            first, last = program.rank_actions[each : each + 2].tolist()
            bounds = begin + np.searchsorted(place[begin:end], np.arange(last - first + 2))
            slots = [*range(first, last), program.actions + each]
            before[slots] = np.stack([bounds[:-1], bounds[1:]], axis=1)
        gather = _gathers(program, stage, kind, place + program.rank_actions[rank])
        return cls(stage.astype(np.int64), kind.astype(np.int64), rank, before, gather)

    def unreduced(self, stages: int) -> list[int]:
        """The stages without a REDUCE_GRAD, of so many, ascending."""
        reduced = set(self.stage[self.kind == Kind.REDUCE_GRAD].tolist())
        return [stage for stage in range(stages) if stage not in reduced]


def _gathers(program: ProgramTables, stage: Integers, kind: Integers, place: Integers) -> Integers:
    """The last UNSHARD of each row's stage before the row's action; -1 for none. Places count all actions."""
    gather = np.full(len(program.stage), -1)
    for each in np.unique(stage[kind == Kind.UNSHARD]).tolist():
        entries = np.flatnonzero((stage == each) & (kind == Kind.UNSHARD))
        rows = np.flatnonzero(program.stage == each)
        at = np.searchsorted(place[entries], program.row_action[rows], side="right") - 1
        gather[rows] = np.where(at >= 0, entries[np.maximum(at, 0)], -1)
    return gather
