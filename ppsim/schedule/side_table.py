"""Side table: what a program runs beside its computations, as the streams of each rank run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.offload import Offload
from ppsim.schedule.program_tables import Integers, ProgramTables
from ppsim.schedule.sharding import Sharding

STREAMS = 3
"""How many streams a rank has beside computations: one for collectives, and one for copies in each direction."""
_COLLECTIVE, _OUT, _BACK = range(STREAMS)


class SideTable(NamedTuple):
    """What runs beside computations, rank after rank.

    It is a tuple because compiled passes take it as it is.

    Parameters
    ----------
    stage, kind, microbatch, rank : arrays of shape (entries,)
        UNSHARD, REDUCE_GRAD, O or L of which stage and microbatch (-1 for none), and who runs it.
    stream : array of shape (entries,)
        The stream that runs each, one entry after another: `STREAMS` for each rank.
    after : array of shape (entries,)
        The O that an L must wait for; -1 for none.
    before : array of shape (actions + p, 2)
        The entries begin to end that stand right before each action, and, from entry `actions` on, after the last of
        each rank.
    gather : array of shape (rows,)
        The UNSHARD that makes a row's stage whole; -1 for none.
    load : array of shape (rows,)
        The L that brings back what a row needs; -1 for none.
    blocks : array of shape (entries,)
        Whether each keeps its rank from going on until it ends. Of a program none does: `blocking` says so.
    """

    stage: Integers
    kind: Integers
    microbatch: Integers
    rank: Integers
    stream: Integers
    after: Integers
    before: Integers
    gather: Integers
    load: Integers
    blocks: npt.NDArray[np.bool_]

    @classmethod
    def none(cls) -> SideTable:
        """Nothing, of a program without sharding and copies."""
        of_name = {"before": np.zeros((0, 2), np.int64), "blocks": np.zeros(0, bool)}
        return cls(*(of_name.get(name, np.zeros(0, np.int64)) for name in cls._fields))

    @classmethod
    def of(
        cls, program: ProgramTables, sharding: Sequence[Sharding] | None, offload: Sequence[Offload] | None
    ) -> SideTable:
        """The table of a program's sharding, of its copies, or of both; what stands at one place in this sequence."""
        columns = [
            _of_rank(None if sharding is None else sharding[rank], None if offload is None else offload[rank])
            for rank in range(program.ranks)
        ]
        place, stage, kind, microbatch = np.concatenate(columns, axis=1)
        counts = [each.shape[1] for each in columns]
        rank = np.repeat(np.arange(program.ranks), counts)
        before = np.empty((program.actions + program.ranks, 2), np.int64)
        for each, (begin, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
            first, last = program.rank_actions[each : each + 2].tolist()
            bounds = begin + np.searchsorted(place[begin : begin + count], np.arange(last - first + 2))
            slots = [*range(first, last), program.actions + each]
            before[slots] = np.stack([bounds[:-1], bounds[1:]], axis=1)
        of_kind = np.where(kind == Kind.O, _OUT, np.where(kind == Kind.L, _BACK, _COLLECTIVE))
        after, load = _copies_awaited(program, stage, kind, microbatch)
        return cls(
            stage=stage,
            kind=kind,
            microbatch=microbatch,
            rank=rank,
            stream=rank * STREAMS + of_kind,
            after=after,
            before=before,
            gather=_gathers(program, stage, kind, place + program.rank_actions[rank]),
            load=load,
            blocks=np.zeros(len(stage), bool),
        )

    def blocking(self) -> SideTable:
        """The table of a device without streams for copies and reductions: see `Conditions.blocking`."""
        return self._replace(blocks=self.kind != Kind.UNSHARD)

    @property
    def slot(self) -> Integers:
        """Where each entry stands, as a row of `before`, shape (entries,)."""
        in_sequence = np.argsort(self.before[:, 0], kind="stable")
        found: Integers = np.repeat(in_sequence, np.diff(self.before, axis=1)[in_sequence, 0])
        return found

    @property
    def is_copy(self) -> npt.NDArray[np.bool_]:
        """Whether each entry is an O or an L, shape (entries,)."""
        found: npt.NDArray[np.bool_] = (self.kind == Kind.O) | (self.kind == Kind.L)
        return found

    def unreduced(self, stages: int) -> list[int]:
        """The stages without a REDUCE_GRAD, of so many, ascending."""
        reduced = set(self.stage[self.kind == Kind.REDUCE_GRAD].tolist())
        return [stage for stage in range(stages) if stage not in reduced]


def _of_rank(sharding: Sharding | None, offload: Offload | None) -> Integers:
    """Place, stage, kind and microbatch of what a rank runs, shape (4, entries)."""
    parts = [np.zeros((4, 0), np.int64)]
    if sharding is not None:
        whole = np.stack([sharding.before, sharding.stage, sharding.kind, np.full(len(sharding), -1)])
        parts.append(whole[:, sharding.kind != Kind.RESHARD])  # which takes no time
    if offload is not None:
        parts.append(np.stack([offload.before, offload.stage, offload.kind, offload.microbatch]))
    entries = np.concatenate(parts, axis=1)
    in_sequence: Integers = entries[:, np.argsort(entries[0], kind="stable")]
    return in_sequence


def _gathers(program: ProgramTables, stage: Integers, kind: Integers, place: Integers) -> Integers:
    """The last UNSHARD of each row's stage before the row's action; -1 for none. Places count all actions."""
    gather = np.full(len(program.stage), -1)
    for each in np.unique(stage[kind == Kind.UNSHARD]).tolist():
        entries = np.flatnonzero((stage == each) & (kind == Kind.UNSHARD))
        rows = np.flatnonzero(program.stage == each)
        at = np.searchsorted(place[entries], program.row_action[rows], side="right") - 1
        gather[rows] = np.where(at >= 0, entries[np.maximum(at, 0)], -1)
    return gather


def _copies_awaited(
    program: ProgramTables, stage: Integers, kind: Integers, microbatch: Integers
) -> tuple[Integers, Integers]:
    """The O that each entry waits for, and the L that each row waits for; -1 for none.

    What needs activations first is the R of their microbatch, or else its B or I.
    """
    after, load = np.full(len(stage), -1), np.full(len(program.stage), -1)
    out, back = np.flatnonzero(kind == Kind.O), np.flatnonzero(kind == Kind.L)
    if not len(back):
        return after, load
    width = int(program.microbatch.max()) + 1
    needs = (program.kind == Kind.R) | (np.isin(program.kind, (Kind.B, Kind.I)) & ~program.is_recomputed)
    rows = np.flatnonzero(needs)
    cell = (stage * width + microbatch)[back]
    after[back] = out[_found((stage * width + microbatch)[out], cell)]
    load[rows[_found(program.stage[rows].astype(np.int64) * width + program.microbatch[rows], cell)]] = back
    return after, load


def _found(among: Integers, wanted: Integers) -> Integers:
    """The index of each wanted number."""
    order = np.argsort(among)
    index: Integers = order[np.searchsorted(among[order], wanted)]
    return index
