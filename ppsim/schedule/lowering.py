"""Lowering: the orders of all ranks become flat tables with derived messages, and are checked on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind
from ppsim.schedule.communication import written_posts
from ppsim.schedule.order import Order
from ppsim.schedule.posts import Posts
from ppsim.schedule.program_tables import Integers, Messages, ProgramTables, row_actions

_CELLS_AT_ONCE = 2**18  # so that no 64-bit index as large as the program is made
_MOST_ROWS = 2**31 - 1  # the tables hold 32-bit numbers: half the memory, and half of what an engine must read
_KINDS = (Kind.F, Kind.W, Kind.B, Kind.I, Kind.R)  # what is wrong is told in this sequence
_PLACE_OF_KIND = np.zeros(len(Kind), np.int64)
_PLACE_OF_KIND[list(_KINDS)] = np.arange(len(_KINDS))


def lower(
    orders: Sequence[Order],
    placement: Sequence[int],
    microbatches: int,
    communication: Sequence[Posts] | None = None,
    copies: int = 1,
) -> ProgramTables:
    """Join the orders to one table, find what each computation needs, and derive the messages.

    Parameters
    ----------
    orders : sequence of p orders
        What each rank computes, in sequence.
    placement : sequence of stages ints
        The rank of each stage.
    microbatches : int
        Number of microbatches, m.
    communication : sequence of p Posts, optional
        What each rank sends and receives, and where. Derived unless given.
    copies : int
        Copies of the model that the stages are of, one copy's after the other's. Each microbatch passes through one.

    Returns
    -------
    ProgramTables
        The same computations in the same sequence, with the messages between ranks.

    Raises
    ------
    ScheduleError
        Unless every microbatch has, on every stage of one copy, one F and either one B, or one I and one W (or nothing
        has a backward), on the rank that holds the stage and after what it needs from that rank, and at most one R,
        between F and B or I. PostError, which is one, for communication that is not exactly what the computations need.

    Notes
    -----
    Whether the ranks may wait for each other for ever is another question: see `deadlock`.
    """
    table = _join(orders)
    rows = _rows_of(table, placement, microbatches, copies)
    wrong = next(rows.violations(), None)
    if wrong is not None:
        raise ScheduleError(wrong.message)
    needs = _needs(rows)
    messages = _message_table(needs, table.rank, row_actions(table.action_start))
    message_in, message_out = _ends(messages, len(table.stage))
    tables = ProgramTables(
        **table._asdict(), needs=needs, message_in=message_in, message_out=message_out, messages=messages
    )
    if communication is None:
        return tables
    messages, written = written_posts(tables, communication)
    message_in, message_out = _ends(messages, len(table.stage))
    return replace(tables, messages=messages, written=written, message_in=message_in, message_out=message_out)


def _ends(messages: Messages, rows: int) -> tuple[Integers, Integers]:
    """The message that comes to each row and the one that leaves it, shape (rows,) each; -1 for none."""
    message_in, message_out = np.full(rows, -1, np.int32), np.full(rows, -1, np.int32)
    message_in[messages.consumer] = message_out[messages.producer] = np.arange(len(messages), dtype=np.int32)
    return message_in, message_out


class Violation(NamedTuple):
    """Something that is missing, doubled or out of order.

    Parameters
    ----------
    message : str
        What is wrong, and the remedy.
    rows : tuple of int
        The rows of the joined orders that it concerns.
    """

    message: str
    rows: tuple[int, ...]


def find_violations(
    orders: Sequence[Order], placement: Sequence[int], microbatches: int, copies: int = 1
) -> list[Violation]:
    """Everything that keeps the orders from being lowered; `lower` complains about the first.

    Parameters
    ----------
    orders, placement, microbatches, copies
        As in `lower`.

    Returns
    -------
    list of Violation

    Raises
    ------
    ScheduleError
        If there is no action, or one of a stage or microbatch that does not exist, on a rank that does not hold it, or
        if there are fewer actions than (stage, microbatch) pairs.
    """
    return list(_rows_of(_join(orders), placement, microbatches, copies).violations())


class _Table(NamedTuple):
    """All orders as one table; see `ProgramTables`."""

    stage: Integers
    kind: Integers
    microbatch: Integers
    rank: Integers
    action_start: Integers
    rank_actions: Integers

    def action_of(self, row: int) -> Action:
        """The row as an Action (one part of a pair)."""
        return Action(int(self.stage[row]), Kind(int(self.kind[row])), int(self.microbatch[row]))


def _join(orders: Sequence[Order]) -> _Table:
    if not any(len(order) for order in orders):
        raise ScheduleError("the schedule holds no action: give each rank its actions, as in 0F0 0B0")
    parts = np.array([len(order.stage) for order in orders], np.int64)
    if parts.sum() > _MOST_ROWS:
        raise ScheduleError(f"the schedule has {parts.sum()} actions, more than {_MOST_ROWS}: take fewer microbatches")
    stage, kind, microbatch = (
        np.concatenate([getattr(order, name) for order in orders]) for name in ("stage", "kind", "microbatch")
    )
    actions = np.array([len(order) for order in orders], np.int64)
    rank = np.repeat(np.arange(len(orders), dtype=np.int32), parts)
    part_offset = np.cumsum(parts) - parts
    starts = [order.starts + offset for order, offset in zip(orders, part_offset, strict=True)]
    action_start = np.concatenate([*starts, [len(stage)]]).astype(np.int32)

    rank_actions = np.concatenate([[0], np.cumsum(actions)])
    return _Table(stage, kind, microbatch, rank, action_start, rank_actions)


def _rows_of(table: _Table, placement: Sequence[int], microbatches: int, copies: int) -> _Rows:
    """The table by (stage, microbatch). Raises ScheduleError where such an index cannot be made."""
    _check_names(placement, microbatches, table.stage, table.microbatch, table.rank)
    stages = len(placement) // copies
    _check_enough(stages, microbatches, table)
    return _Rows((stages, microbatches), table, copies)


class _Rows:
    """The rows of each (stage, microbatch): its F, its R, its backward toward the input (B or I), its W; -1: none.

    Stages count within a copy of the model here. A microbatch passes through one copy, so there is one row for each at
    most.
    """

    def __init__(self, shape: tuple[int, int], table: _Table, copies: int) -> None:
        self.table, self.copies = table, copies
        self.shape = shape  # (stages of a copy, microbatches)
        places = _PLACE_OF_KIND[table.kind]
        places *= shape[0] * shape[1]
        places += self._cells()
        index = np.full(len(_KINDS) * shape[0] * shape[1], -1, np.int32)
        index[places] = np.arange(len(places), dtype=np.int32)  # of several the last to be written stays
        self.of_kind = dict(zip(_KINDS, index.reshape(-1, *shape), strict=True))
        self.forward, self.weight, full = self.of_kind[Kind.F], self.of_kind[Kind.W], self.of_kind[Kind.B]
        self.backward = np.where(full >= 0, full, self.of_kind[Kind.I])
        self.is_forward_only = bool((table.kind == Kind.F).all())

    def _cells(self) -> Integers:
        """The number of the (stage, microbatch) of each row; fits 32 bits, as there are no more cells than rows."""
        stage = self.table.stage if self.copies == 1 else self.table.stage % np.int32(self.shape[0])
        return stage * np.int32(self.shape[1]) + self.table.microbatch

    def violations(self) -> Iterator[Violation]:
        """All that is astray, else all that is doubled. Where nothing is: all that is missing or out of order."""
        for complaints in (self._astray(), self._doubled()):
            found = list(complaints)
            yield from found
            if found:
                return
        yield from self._incomplete()
        if not self.is_forward_only:
            recompute = self.of_kind[Kind.R]
            if (recompute >= 0).any():
                yield from self._out_of_order(self.forward, recompute)
                yield from self._out_of_order(recompute, self.backward)
            yield from self._out_of_order(self.forward, self.backward)
            yield from self._out_of_order(self.backward, self.weight)

    def _astray(self) -> Iterator[Violation]:
        """Microbatches that two copies of the model compute, and copies that compute none."""
        if self.copies == 1:
            return
        copy = self.table.stage // self.shape[0]
        for idle in sorted(set(range(self.copies)) - set(copy.tolist())):
            stages = range(idle * self.shape[0], (idle + 1) * self.shape[0])
            yield Violation(
                f"stages {stages[0]} to {stages[-1]}, a copy of the model, compute nothing: give each a microbatch",
                (),
            )
        first = _first_rows(self.table.microbatch, self.shape[1])
        elsewhere = np.flatnonzero(copy != copy[first[self.table.microbatch]])
        for microbatch, at in zip(*np.unique(self.table.microbatch[elsewhere], return_index=True), strict=True):
            rows = int(first[microbatch]), int(elsewhere[at])
            here, there = map(self.table.action_of, rows)
            message = (
                f"microbatch {microbatch} is computed by two copies of the model, in {here} and {there}: let it pass "
                f"through the {self.shape[0]} stages of one of them"
            )
            yield Violation(message, rows)

    def _doubled(self) -> Iterator[Violation]:
        if sum(np.count_nonzero(index >= 0) for index in self.of_kind.values()) == len(self.table.kind):
            return
        cells = self._cells()
        for kind in self.of_kind:
            rows = np.flatnonzero(self.table.kind == kind)
            counts = np.bincount(cells[rows], minlength=self.shape[0] * self.shape[1])
            for each in np.flatnonzero(counts > 1).tolist():
                found = rows[cells[rows] == each].tolist()
                yield Violation(f"{self.table.action_of(found[0])} occurs {counts[each]} times: keep one", tuple(found))

    def _incomplete(self) -> Iterator[Violation]:
        """Every (stage, microbatch) has one F and one way back, or nothing has a backward."""
        yield from self._unless(self.forward >= 0, "has no F: add {}F{}")
        if self.is_forward_only:
            return
        has_full, has_split, has_weight = (self.of_kind[kind] >= 0 for kind in (Kind.B, Kind.I, Kind.W))
        yield from self._unless(
            has_full | has_split | has_weight, "has no backward: add {0}B{1}, or {0}I{1} and {0}W{1}"
        )
        yield from self._unless(
            ~(has_full & (has_split | has_weight)),
            "has a full backward B and a split one: keep {0}B{1}, or {0}I{1} and {0}W{1}",
        )
        yield from self._unless(has_full | has_split | ~has_weight, "has W without I: add {}I{}")
        yield from self._unless(has_full | has_weight | ~has_split, "has I without W: add {}W{}")

    def _unless(self, holds: npt.NDArray[np.bool_], complaint: str) -> Iterator[Violation]:
        if holds.all():
            return
        copy = _copies_of(self.table, *self.shape)
        for each, microbatch in np.argwhere(~holds).tolist():
            found = [int(index[each, microbatch]) for index in self.of_kind.values()]
            stage = each + int(copy[microbatch]) * self.shape[0]
            message = f"stage {stage}, microbatch {microbatch} {complaint.format(stage, microbatch)}"
            yield Violation(message, tuple(row for row in found if row >= 0))

    def _out_of_order(self, before: Integers, after: Integers) -> Iterator[Violation]:
        """R and a backward come after their F, a backward after its R, W after its I, in a later action of the rank."""
        row_action = row_actions(self.table.action_start)
        # Also not in the same action: the F of a pair ends only with its B.
        wrong = (before >= 0) & (after >= 0) & (row_action[after] <= row_action[before])
        if not wrong.any():
            return
        for cell in np.flatnonzero(wrong).tolist():
            first, second = int(before.reshape(-1)[cell]), int(after.reshape(-1)[cell])
            late, early = map(self.table.action_of, (first, second))
            message = (
                f"on rank {self.table.rank[first]} {early} comes before {late}, which it needs: put {early} after "
                f"{late}"
            )
            yield Violation(message, (first, second))


def _needs(rows: _Rows) -> Integers:
    """The row whose result each row takes from another stage, shape (rows,); -1 for none."""
    needs = np.full(len(rows.table.stage), -1, np.int32)
    stages, microbatches = rows.shape
    block = max(_CELLS_AT_ONCE // microbatches, 1)
    for first in range(0, stages - 1, block):
        here = slice(first, min(first + block, stages - 1))
        following = slice(here.start + 1, here.stop + 1)
        needs[rows.forward[following]] = rows.forward[here]
        if not rows.is_forward_only:
            needs[rows.backward[here]] = rows.backward[following]
    return needs


def _message_table(needs: Integers, rank: Integers, row_action: Integers) -> Messages:
    """The results that cross ranks, by link and then as their sender produces them."""
    given_to = np.full(len(needs), -1, np.int32)  # the one row that needs each result; no result is needed twice
    takers = np.flatnonzero(needs >= 0)
    takers = takers[rank[needs[takers]] != rank[takers]]
    given_to[needs[takers]] = takers
    producer = np.flatnonzero(given_to >= 0).astype(np.int32)  # ascending, and so their ranks are
    link = _link_numbers(rank[producer], rank[given_to[producer]], int(rank[-1]) + 1)
    by_link = np.argsort(link, kind="stable")
    producer = producer[by_link]
    link = link[by_link].astype(np.int32)
    consumer = given_to[producer]
    per_link = np.bincount(link)
    first = np.repeat(np.cumsum(per_link) - per_link, per_link)
    return Messages(
        producer=producer,
        consumer=consumer,
        source=rank[producer],
        destination=rank[consumer],
        link=link,
        position=(np.arange(len(link)) - first).astype(np.int32),
        sent_after=row_action[producer],
    )


def _link_numbers(source: Integers, destination: Integers, ranks: int) -> Integers:
    """Number the pairs that occur, ascending; in 16 bits where they fit, which NumPy sorts in linear time."""
    pair = source.astype(np.int64) * ranks + destination
    if ranks > 4096:  # a table of all pairs would be large
        number: Integers
        links, number = np.unique(pair, return_inverse=True)
        return number if len(links) > 2**16 else number.astype(np.uint16)
    occurs = np.zeros(ranks * ranks, bool)
    occurs[pair] = True
    links = np.flatnonzero(occurs)
    numbers = np.zeros(ranks * ranks, np.int64 if len(links) > 2**16 else np.uint16)
    numbers[links] = np.arange(len(links))
    found: Integers = numbers[pair]
    return found


def _check_names(
    placement: Sequence[int], microbatches: int, stage: Integers, microbatch: Integers, rank: Integers
) -> None:
    """Every stage and microbatch exists, and computes on the rank that holds it."""
    stages = len(placement)
    outside = (stage < 0) | (stage >= stages) | (microbatch < 0) | (microbatch >= microbatches)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ScheduleError(
            f"rank {rank[row]} computes stage {stage[row]}, microbatch {microbatch[row]}, but there are only "
            f"{stages} stages and {microbatches} microbatches, counted from 0: leave it out or correct its numbers"
        )
    misplaced = np.asarray(placement)[stage] != rank
    if misplaced.any():
        row = int(np.flatnonzero(misplaced)[0])
        raise ScheduleError(
            f"stage {stage[row]} computes on rank {rank[row]} but is placed on rank {placement[stage[row]]}: "
            "move its actions there"
        )


def _check_enough(stages: int, microbatches: int, table: _Table) -> None:
    """Name a missing F if there are fewer rows than (stage, microbatch) cells of one copy."""
    # Before any table with an entry for each cell is made: one action with a mistyped microbatch, 0F2000000000, would
    # make it gigabytes.
    if stages * microbatches <= len(table.stage):
        return
    is_forward = table.kind == Kind.F
    of_copy = table.stage % stages
    given = np.unique(np.stack([of_copy[is_forward], table.microbatch[is_forward]], axis=1), axis=0)
    wanted = np.divmod(np.arange(len(given)), min(microbatches, 2**40))
    differs = (given[:, 0] != wanted[0]) | (given[:, 1] != wanted[1])
    missing = int(np.argmax(differs)) if differs.any() else len(given)
    s, b = divmod(missing, microbatches)
    rows = np.flatnonzero(table.microbatch == b)
    if len(rows):
        s += int(table.stage[rows[0]]) // stages * stages
    raise ScheduleError(f"stage {s}, microbatch {b} has no F: add {s}F{b}")


def _first_rows(microbatch: Integers, microbatches: int) -> Integers:
    """The first row of each microbatch, shape (microbatches,); 0 for one without rows."""
    first = np.zeros(microbatches, np.int64)
    first[microbatch[::-1]] = np.arange(len(microbatch))[::-1]  # of several the last to be written stays
    return first


def _copies_of(table: _Table, stages: int, microbatches: int) -> Integers:
    """The copy of the model that each microbatch passes through, shape (microbatches,); 0 for one without rows."""
    copy = np.zeros(microbatches, np.int32)
    copy[table.microbatch] = table.stage // np.int32(stages)
    return copy
