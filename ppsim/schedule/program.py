"""Program: a schedule lowered to flat tables; what both clocks run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.schedule import Schedule, concatenated

Integers = npt.NDArray[np.integer]

_CELLS_AT_ONCE = 2**18  # so that no 64-bit index as large as the program is made
_MOST_ROWS = 2**31 - 1  # the tables hold 32-bit numbers: half the memory, and half of what an engine must read


@dataclass(frozen=True, kw_only=True)
class Messages:
    """The message table, shape (messages,) each, ordered by link and then by position on it.

    producer, consumer: rows of the program. source, destination: ranks; a link is such an ordered pair.
    link: its number in `Program.links()`. position: 0 for the first message of the link; a link carries messages in
    the order in which its sender's program produces them.
    """

    producer: Integers
    consumer: Integers
    source: Integers
    destination: Integers
    link: Integers
    position: Integers

    def __len__(self) -> int:
        return len(self.producer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """All orders as one table with a row per part of an action, rank after rank, plus the message table.

    stage, kind, microbatch, rank: shape (rows,). action_start: shape (actions + 1,); action k has the rows
    action_start[k] to action_start[k + 1] (two for an overlapped pair, else one). rank_actions: shape (p + 1,);
    rank r has the actions rank_actions[r] to rank_actions[r + 1]. needs: shape (rows,); the row whose result this row
    waits for across stages, -1 for none. message_in, message_out: shape (rows,); the message that brings what the row
    needs and the one that takes its result away, -1 where nothing crosses ranks.
    """

    schedule: Schedule
    stage: Integers
    kind: Integers
    microbatch: Integers
    rank: Integers
    action_start: Integers
    rank_actions: Integers
    needs: Integers
    message_in: Integers
    message_out: Integers
    messages: Messages = field(repr=False)

    @property
    def ranks(self) -> int:
        """p."""
        return self.schedule.ranks

    @property
    def actions(self) -> int:
        """Number of actions; an overlapped pair counts once."""
        return len(self.action_start) - 1

    @property
    def has_pairs(self) -> bool:
        """Whether some action is an overlapped pair; without one, row k is action k."""
        return self.actions < len(self.stage)

    @cached_property
    def row_action(self) -> Integers:
        """The action that each row belongs to, shape (rows,)."""
        return _row_actions(self.action_start)

    @cached_property
    def execution_order(self) -> Integers:
        """All actions in one sequence in which each comes after everything it needs, shape (actions,).

        The proof that the program ends; raises ScheduleError, with the circle, if it cannot (see `deadlock`).
        """
        from ppsim.schedule.deadlock import execution_order

        return execution_order(self)

    def action_of(self, row: int) -> Action:
        """The row as an Action (one part of a pair)."""
        return Action(int(self.stage[row]), Kind(int(self.kind[row])), int(self.microbatch[row]))

    def rows_of(self, rank: int) -> range:
        """The rows of a rank, in its order."""
        first, last = self.rank_actions[rank], self.rank_actions[rank + 1]
        return range(int(self.action_start[first]), int(self.action_start[last]))

    def message_action(self, message: int, *, sending: bool) -> Action:
        """A message as PyTorch spells it: `0SEND_F3` at its producer, `1RECV_F3` at its consumer."""
        row = int(self.messages.producer[message] if sending else self.messages.consumer[message])
        is_forward = self.kind[row] == Kind.F
        kind = (Kind.SEND_F if is_forward else Kind.SEND_B) if sending else (Kind.RECV_F if is_forward else Kind.RECV_B)
        return Action(int(self.stage[row]), kind, int(self.microbatch[row]))

    def order_with_messages(self, rank: int) -> list[Action | OverlappedPair]:
        """A rank's actions with the receives that they need before and their sends after them.

        A link's receives come in the order of its sends, as they must where messages carry no names; so one that is
        overtaken in use comes before its turn.
        """
        first, last = int(self.rank_actions[rank]), int(self.rank_actions[rank + 1])
        posted: dict[int, int] = {}  # source -> how many receives of its link have been written
        result: list[Action | OverlappedPair] = []
        for action in range(first, last):
            rows = range(int(self.action_start[action]), int(self.action_start[action + 1]))
            for message in (int(self.message_in[row]) for row in rows if self.message_in[row] >= 0):
                source, position = int(self.messages.source[message]), int(self.messages.position[message])
                begin = message - position + posted.get(source, 0)  # the table has a link's messages side by side
                result += [self.message_action(at, sending=False) for at in range(begin, message + 1)]
                posted[source] = max(posted.get(source, 0), position + 1)
            parts = [self.action_of(row) for row in rows]
            result.append(OverlappedPair(*parts) if len(parts) == 2 else parts[0])
            result += [
                self.message_action(int(self.message_out[row]), sending=True)
                for row in rows
                if self.message_out[row] >= 0
            ]
        return result

    def links(self) -> list[tuple[int, int]]:
        """The directed links (source rank, destination rank) that carry at least one message, ascending."""
        first = np.flatnonzero(self.messages.position == 0)  # the table is ordered by link
        return list(zip(self.messages.source[first].tolist(), self.messages.destination[first].tolist(), strict=True))


def lower(schedule: Schedule) -> Program:
    """Lower a schedule; raises ScheduleError unless it is complete and in order on every rank.

    Whether it can end is a separate question: `Program.execution_order`.
    """
    orders = schedule.orders
    if not any(len(order) for order in orders):
        raise ScheduleError("the schedule holds no action: give each rank its actions, as in 0F0 0B0")
    parts = np.array([len(order.stage) for order in orders], np.int64)
    if parts.sum() > _MOST_ROWS:
        raise ScheduleError(f"the schedule has {parts.sum()} actions, more than {_MOST_ROWS}: take fewer microbatches")
    stage, kind, microbatch = (concatenated(orders, name) for name in ("stage", "kind", "microbatch"))
    actions = np.array([len(order) for order in orders], np.int64)
    rank = np.repeat(np.arange(len(orders), dtype=np.int32), parts)
    part_offset = np.cumsum(parts) - parts
    starts = [order.starts + offset for order, offset in zip(orders, part_offset, strict=True)]
    action_start = np.concatenate([*starts, [len(stage)]]).astype(np.int32)

    _check_names(schedule, stage, microbatch, rank)
    _check_enough(schedule, stage, kind, microbatch)
    rows = _Rows(schedule, stage, kind, microbatch)
    rows.check_complete()
    _check_local_order(schedule, rows, _row_actions(action_start))

    needs = _needs(schedule, rows)
    messages = _message_table(needs, rank)
    message_in = np.full(len(stage), -1, np.int32)
    message_out = np.full(len(stage), -1, np.int32)
    message_in[messages.consumer] = message_out[messages.producer] = np.arange(len(messages), dtype=np.int32)
    return Program(
        schedule=schedule,
        stage=stage,
        kind=kind,
        microbatch=microbatch,
        rank=rank,
        action_start=action_start,
        rank_actions=np.concatenate([[0], np.cumsum(actions)]),
        needs=needs,
        message_in=message_in,
        message_out=message_out,
        messages=messages,
    )


def _row_actions(action_start: Integers) -> Integers:
    rows, actions = int(action_start[-1]), len(action_start) - 1
    index = np.arange(actions, dtype=np.int32)
    return index if rows == actions else np.repeat(index, np.diff(action_start))


def _needs(schedule: Schedule, rows: _Rows) -> Integers:
    """The row whose result each row takes from another stage, shape (rows,); -1 for none."""
    needs = np.full(len(rows.stage), -1, np.int32)
    after = schedule.next_stages()
    block = max(_CELLS_AT_ONCE // schedule.microbatches, 1)
    for first in range(0, schedule.stages, block):
        stage, microbatch = np.nonzero(after[first : first + block] >= 0)
        stage += first
        following = after[stage, microbatch]
        needs[rows.forward[following, microbatch]] = rows.forward[stage, microbatch]
        if not schedule.is_forward_only:
            needs[rows.backward[stage, microbatch]] = rows.backward[following, microbatch]
    return needs


def _message_table(needs: Integers, rank: Integers) -> Messages:
    """The results that cross ranks, by link and then as their sender produces them."""
    given_to = np.full(len(needs), -1, np.int32)  # no result is needed twice
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
    )


def _link_numbers(source: Integers, destination: Integers, ranks: int) -> Integers:
    """Number the pairs that occur, ascending; in 16 bits where they fit, which NumPy sorts in linear time."""
    pair = source.astype(np.int64) * ranks + destination
    if ranks > 4096:  # a table of all pairs would be large
        links, number = np.unique(pair, return_inverse=True)
        return number if len(links) > 2**16 else number.astype(np.uint16)
    occurs = np.zeros(ranks * ranks, bool)
    occurs[pair] = True
    links = np.flatnonzero(occurs)
    numbers = np.zeros(ranks * ranks, np.int64 if len(links) > 2**16 else np.uint16)
    numbers[links] = np.arange(len(links))
    return numbers[pair]


def _check_names(schedule: Schedule, stage: Integers, microbatch: Integers, rank: Integers) -> None:
    outside = (stage < 0) | (stage >= schedule.stages) | (microbatch < 0) | (microbatch >= schedule.microbatches)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ScheduleError(
            f"rank {rank[row]} computes stage {stage[row]}, microbatch {microbatch[row]}, but there are only "
            f"{schedule.stages} stages and {schedule.microbatches} microbatches, counted from 0"
        )
    misplaced = np.asarray(schedule.placement)[stage] != rank
    if misplaced.any():
        row = int(np.flatnonzero(misplaced)[0])
        raise ScheduleError(
            f"stage {stage[row]} computes on rank {rank[row]} but is placed on rank "
            f"{schedule.placement[stage[row]]}: move its actions there"
        )


def _check_enough(schedule: Schedule, stage: Integers, kind: Integers, microbatch: Integers) -> None:
    """Find a missing F where there are fewer rows than forwards needed, before tables of that size are made.

    One action with a mistyped microbatch, 0F2000000000, would otherwise ask for gigabytes.
    """
    if schedule.stages * schedule.microbatches <= len(stage):
        return
    is_forward = kind == Kind.F
    given = np.unique(np.stack([stage[is_forward], microbatch[is_forward]], axis=1), axis=0)
    wanted = np.divmod(np.arange(len(given)), min(schedule.microbatches, 2**40))
    differs = (given[:, 0] != wanted[0]) | (given[:, 1] != wanted[1])
    missing = int(np.argmax(differs)) if differs.any() else len(given)
    s, b = divmod(missing, schedule.microbatches)
    raise ScheduleError(f"stage {s}, microbatch {b} has no F: add {s}F{b}")


class _Rows:
    """Where each (stage, microbatch) has its F, its backward toward the input (B or I) and its W; -1 for none."""

    def __init__(self, schedule: Schedule, stage: Integers, kind: Integers, microbatch: Integers) -> None:
        self.stage, self.kind, self.microbatch = stage, kind, microbatch
        self.shape = (schedule.stages, schedule.microbatches)
        self.is_forward_only = schedule.is_forward_only
        self.forward = self._index(Kind.F)
        self.weight = self._index(Kind.W)
        full, split = self._index(Kind.B), self._index(Kind.I)
        self.backward = np.where(full >= 0, full, split)
        self._full, self._split = full, split

    def _index(self, kind: Kind) -> Integers:
        rows = np.flatnonzero(self.kind == kind)
        # Fits 32 bits: there are no more cells than rows (`_check_enough`).
        cell = self.stage[rows] * np.int32(self.shape[1]) + self.microbatch[rows]
        counts = np.bincount(cell, minlength=self.shape[0] * self.shape[1])
        if (counts > 1).any():
            stage, microbatch = divmod(int(np.argmax(counts > 1)), self.shape[1])
            raise ScheduleError(f"{Action(stage, kind, microbatch)} occurs {counts.max()} times: keep one")
        index = np.full(self.shape[0] * self.shape[1], -1, np.int32)
        index[cell] = rows
        return index.reshape(self.shape)

    def check_complete(self) -> None:
        self._demand(self.forward >= 0, "has no F: add {}F{}")
        if self.is_forward_only:
            return
        has_full, has_split, has_weight = self._full >= 0, self._split >= 0, self.weight >= 0
        self._demand(has_full | has_split | has_weight, "has no backward: add {0}B{1}, or {0}I{1} and {0}W{1}")
        self._demand(
            ~(has_full & (has_split | has_weight)),
            "has a full backward B and a split one: keep {0}B{1}, or {0}I{1} and {0}W{1}",
        )
        self._demand(has_full | has_split, "has W without I: add {}I{}")
        self._demand(has_full | has_weight, "has I without W: add {}W{}")

    def _demand(self, holds: npt.NDArray[np.bool_], complaint: str) -> None:
        if not holds.all():
            stage, microbatch = divmod(int(np.argmax(~holds)), self.shape[1])
            raise ScheduleError(f"stage {stage}, microbatch {microbatch} {complaint.format(stage, microbatch)}")


def _check_local_order(schedule: Schedule, rows: _Rows, row_action: Integers) -> None:
    """On its rank a backward must come after its F, and W after its I, in another action."""
    if schedule.is_forward_only:
        return
    for before, after in ((rows.forward, rows.backward), (rows.backward, rows.weight)):
        wrong = (after >= 0) & (row_action[after] <= row_action[before])
        if wrong.any():
            cell = int(np.argmax(wrong))
            first, second = int(before.reshape(-1)[cell]), int(after.reshape(-1)[cell])
            late, early = (
                Action(int(rows.stage[row]), Kind(int(rows.kind[row])), int(rows.microbatch[row]))
                for row in (first, second)
            )
            where = f"rank {schedule.placement[late.stage]}"
            raise ScheduleError(f"on {where} {early} comes before {late}, which it needs: put {early} after {late}")
