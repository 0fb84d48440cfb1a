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
        What each entry is: its stage, its kind (UNSHARD, REDUCE_GRAD, O or L), its microbatch (-1 if it concerns a
        whole stage) and its rank.
    stream : array of shape (entries,)
        The stream that runs each entry: rank * `STREAMS` and up. A stream runs one entry at a time.
    after : array of shape (entries,)
        The O that an L must wait for; -1 for none.
    before : array of shape (actions + p, 2)
        Row a: the range (begin, end) of the entries that stand right before action a. Row actions + r: the range of
        those after the last action of rank r.
    gather : array of shape (rows,)
        The UNSHARD that makes a row's stage whole; -1 for none.
    load : array of shape (rows,)
        The L that brings back what a row needs; -1 for none.
    blocks : array of shape (entries,)
        Whether the rank's computations wait until the entry ends. A program's table has False alone; see `blocking`.
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
        """The table of a program without sharding and copies. All columns are empty, `before` and `gather` too."""
        of_name = {"before": np.zeros((0, 2), np.int64), "blocks": np.zeros(0, bool)}
        return cls(*(of_name.get(name, np.zeros(0, np.int64)) for name in cls._fields))

    @classmethod
    def of(
        cls, program: ProgramTables, sharding: Sequence[Sharding] | None, offload: Sequence[Offload] | None
    ) -> SideTable:
        """The table of a program's sharding, of its copies, or of both. At one place sharding comes before copies."""
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
        """This table, but copies and reductions block: as on a device without streams, see `Conditions.blocking`."""
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
        parts.append(whole[:, sharding.kind != Kind.RESHARD])  # a RESHARD takes no time
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
    """The O that each L waits for, and the L that each row waits for; -1 for none.

    The row that first needs the activations of a microbatch is its R, or else its B or I.
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
    """The index of each wanted number, all of which occur."""
    order = np.argsort(among)
    index: Integers = order[np.searchsorted(among[order], wanted)]
    return index
