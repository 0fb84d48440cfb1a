"""Repeated block: a schedule from the passes of one microbatch, repeated, and moved early where nothing repeats yet.

Qi et al., Pipeline Parallelism with Controllable Memory, 2024, build schedules this way: repeat, squeeze, reorder.

In a V, rank r holds two stages: stage r on the way down and stage 2p - 1 - r on the way up. Here "backward down" is the
I of the stage on the way down, although gradients pass it on their way up.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.order import Order

Integers = npt.NDArray[np.int64]

PASSES = 6  # F, I and W of two stages: the slots that one microbatch takes on a rank
FORWARD_DOWN, FORWARD_UP, BACKWARD_UP, BACKWARD_DOWN, WEIGHT = range(5)  # rows of the tables; W of both stages are one
_GAP, _F, _I = range(3)  # what a slot of a timeline holds


def repeat_block(block: Integers, microbatches: int) -> Sequence[Order]:
    """The orders of all ranks of a V from the slots of one microbatch.

    Parameters
    ----------
    block : array of shape (4, p)
        The slots of forward down, forward up, backward up and backward down on each rank. On one rank they differ
        modulo six. W take the slots between.
    microbatches : int
        How often the block is repeated, m.

    Returns
    -------
    sequence of p Orders

    Notes
    -----
    All passes take one slot.

    1. The block is repeated every six slots, and W fill the gaps of each rank as early as they can.
    2. Passes of warm-up and cool-down move into earlier gaps of their rank, one after another: not before their inputs,
       and only if no rank then holds more activations than the fullest rank of the repeated block. What lies from rank
       0's first backward down to the next forward down of the last microbatch stays, so that rounds in between are
       the block. Then every pass starts as early as its inputs and its rank's sequence allow.
    3. W are taken out. The cool-down moves once more, and W fill the gaps again. So a W no longer keeps a slot that
       a backward could have, and in the warm-up comes as early as it may.

    Step 2 moves W too, each after its I, so that memory stays within that of the block. Step 3 gives the gradients for
    the input the right of way, which is what ends a step sooner.
    """
    slots = block[:, :, None] + PASSES * np.arange(microbatches)
    squeezed = _squeezed_with_weights(slots, _weight_slots(slots))
    slots = _cool_down_moved(squeezed)
    return _orders(slots)


def _busy_slots(slots: Integers) -> npt.NDArray[np.bool_]:
    """Whether each rank is busy with an F or an I in each slot, shape (p, slots)."""
    ranks = slots.shape[1]
    busy = np.zeros((ranks, int(slots.max()) + 1), bool)
    busy[np.arange(ranks)[None, :, None], slots] = True
    return busy


def _weight_slots(slots: Integers) -> Integers:
    """The slots of each rank's W where each takes the first gap after its I, shape (p, 2 m), ascending."""
    _, ranks, microbatches = slots.shape
    total = 2 * microbatches
    input_backwards = np.sort(np.concatenate([slots[BACKWARD_UP], slots[BACKWARD_DOWN]], axis=1), axis=1)
    found = np.empty((ranks, total), np.int64)
    busy = _busy_slots(slots)
    end = busy.shape[1]
    for rank in range(ranks):
        gaps = np.append(np.flatnonzero(~busy[rank]), end + np.arange(total))
        # The k-th W takes the first gap after the k-th I and after the gap of the W before it: in numbers of gaps
        # g(k) = max(first(k), g(k - 1) + 1), so that g(k) - k is a running maximum.
        first = np.searchsorted(gaps, input_backwards[rank], side="right")
        found[rank] = gaps[np.maximum.accumulate(first - np.arange(total)) + np.arange(total)]
    return found


def _sequence(tables: Sequence[Integers]) -> tuple[Integers, Integers, Integers, Integers]:
    """All passes by slot, then rank, then row: slot, rank, row and number of each."""
    places = [np.indices(table.shape) for table in tables]
    slot = np.concatenate([table.ravel() for table in tables])
    row = np.repeat(np.arange(len(tables)), [table.size for table in tables])
    rank, number = (np.concatenate([place[axis].ravel() for place in places]) for axis in (0, 1))
    by_slot = np.lexsort((number, row, rank, slot))
    return slot[by_slot], rank[by_slot], row[by_slot], number[by_slot]


def _stable_phase(rank: Integers, row: Integers, number: Integers, last: int) -> tuple[int, int]:
    """The range of the sequence that does not move, begin and end.

    It begins with rank 0's first backward down. It ends with the next forward down of the last microbatch, on whichever
    rank that is. If there is none, with few microbatches, everything from the begin on stays.
    """
    count = len(rank)
    first = np.flatnonzero((row == BACKWARD_DOWN) & (rank == 0))
    begin = int(first[0]) if len(first) else count
    later = np.flatnonzero((row[begin:] == FORWARD_DOWN) & (number[begin:] == last))
    return begin, begin + int(later[0]) + 1 if len(later) else count


class _Tables:
    """The slot of each pass by row, rank and number, updated as passes move.

    The number of a pass is its microbatch; of a W it counts the W of its rank.
    """

    def __init__(self, tables: Sequence[Integers]) -> None:
        self.slot: list[list[list[int]]] = [table.tolist() for table in tables]
        self.ranks = tables[0].shape[0]

    def inputs_there(self, rank: int, row: int, number: int) -> int:
        """The first slot after what a pass needs: its input, and the pass before it of the same row."""
        after = -1
        if rank > 0 and row in (FORWARD_DOWN, BACKWARD_UP):
            after = self.slot[row][rank - 1][number]
        elif rank + 1 < self.ranks and row in (FORWARD_UP, BACKWARD_DOWN):
            after = self.slot[row][rank + 1][number]
        if FORWARD_DOWN < row < WEIGHT:
            after = max(after, self.slot[row - 1][rank][number])
        if number > 0:
            after = max(after, self.slot[row][rank][number - 1])
        return after + 1


def _squeezed_with_weights(slots: Integers, weights: Integers) -> Integers:
    """Step 2: the slots of F and I once warm-up and cool-down, W among them, have moved, shape (4, p, m)."""
    given = [*slots, weights]
    ranks, microbatches = slots.shape[1:]
    _, rank_of, row_of, number_of = _sequence(given)
    begin, end = _stable_phase(rank_of, row_of, number_of, microbatches - 1)
    shape = (ranks, int(max(slots.max(), weights.max())) + 1)
    busy, change = np.zeros(shape, np.int8), np.zeros(shape, np.int32)
    for row, table in enumerate(given):
        busy[np.arange(ranks)[:, None], table] = 1
        change[np.arange(ranks)[:, None], table] += {FORWARD_DOWN: 1, FORWARD_UP: 1, WEIGHT: -1}.get(row, 0)
    level = np.cumsum(change, axis=1)
    limit = level.max()
    is_busy = [bytearray(each.tobytes()) for each in busy]
    input_backwards = np.sort(np.concatenate([slots[BACKWARD_UP], slots[BACKWARD_DOWN]], axis=1), axis=1).tolist()
    tables = _Tables(given)
    moving = np.r_[0:begin, end : len(rank_of)]
    for rank, row, number in zip(*(each[moving].tolist() for each in (rank_of, row_of, number_of)), strict=True):
        slot = tables.slot[row][rank][number]
        first = tables.inputs_there(rank, row, number)
        if row == WEIGHT:
            first = max(first, input_backwards[rank][number] + 1)
        if is_busy[rank].find(0, first, slot) < 0:
            continue
        if row <= FORWARD_UP:  # it holds activations from its new slot on, so that must lie after the last full one
            full = np.flatnonzero(level[rank, first:slot] >= limit)
            first += int(full[-1]) + 1 if len(full) else 0
        target = is_busy[rank].find(0, first, slot)
        if target < 0:
            continue
        tables.slot[row][rank][number] = target
        is_busy[rank][slot], is_busy[rank][target] = 0, 1
        if row <= FORWARD_UP:
            level[rank, target:slot] += 1
        elif row == WEIGHT:
            level[rank, target:slot] -= 1
        else:
            del input_backwards[rank][bisect.bisect_left(input_backwards[rank], slot)]
            bisect.insort(input_backwards[rank], target)
    return _retimed([np.array(table) for table in tables.slot])


def _retimed(tables: Sequence[Integers]) -> Integers:
    """Every pass as early as its inputs and its rank's sequence allow, shape (4, p, m)."""
    slot_of, rank_of, row_of, number_of = _sequence(tables)
    ranks, microbatches = tables[0].shape
    # Entry s + 1 is of stage s. The entries before the first and after the last stage stay 0: what enters the pipeline
    # is always there.
    forward_end, backward_end = np.zeros((2, 2 * ranks + 2, microbatches), np.int64)
    free = np.zeros(ranks, np.int64)
    found = np.empty((4, ranks, microbatches), np.int64)
    stage_of = np.where((row_of == FORWARD_DOWN) | (row_of == BACKWARD_DOWN), rank_of, 2 * ranks - 1 - rank_of)
    edges = np.flatnonzero(np.diff(slot_of)) + 1
    for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(slot_of)], strict=True):
        rank, row, number, stage = (column[begin:end] for column in (rank_of, row_of, number_of, stage_of))
        ahead, back = row <= FORWARD_UP, (row > FORWARD_UP) & (row < WEIGHT)
        start = free[rank]
        start[ahead] = np.maximum(start[ahead], forward_end[stage[ahead], number[ahead]])
        start[back] = np.maximum(start[back], backward_end[stage[back] + 2, number[back]])
        free[rank] = start + 1
        forward_end[stage[ahead] + 1, number[ahead]] = start[ahead] + 1
        backward_end[stage[back] + 1, number[back]] = start[back] + 1
        timed = row < WEIGHT
        found[row[timed], rank[timed], number[timed]] = start[timed]
    return found


def _cool_down_moved(slots: Integers) -> Integers:
    """Step 3 but for its W: the slots of F and I, shape (4, p, m)."""
    _, rank_of, row_of, number_of = _sequence(list(slots))
    _, end = _stable_phase(rank_of, row_of, number_of, slots.shape[2] - 1)
    timelines = [_Timeline(slots[:, rank]) for rank in range(slots.shape[1])]
    limit = max(max(each.level) for each in timelines)
    tables = _Tables(list(slots))
    for rank, row, number in zip(*(each[end:].tolist() for each in (rank_of, row_of, number_of)), strict=True):
        first = tables.inputs_there(rank, row, number)
        tables.slot[row][rank][number] = timelines[rank].moved(tables.slot[row][rank][number], first, limit)
    return np.array(tables.slot)


class _Timeline:
    """One rank's F and I in their slots, with W in the gaps between: says where a pass may move within a limit."""

    def __init__(self, slots: Integers) -> None:
        self.kind = bytearray(int(slots.max()) + 1)  # of each slot: a gap, an F or an I
        for kind, of_kind in ((_F, slots[:2]), (_I, slots[2:])):
            for slot in of_kind.ravel().tolist():
                self.kind[slot] = kind
        # After each slot: how many W wait, and how many activations are held.
        self.waiting, self.level = [-1] * len(self.kind), [-1] * len(self.kind)
        self._run(0, len(self.kind), len(self.kind))

    def _run(self, first: int, last: int, limit: int) -> bool:
        """Compute waiting W and activations anew from slot `first` on; False if the limit is exceeded.

        It stops after slot `last` once they are what they were.
        """
        waiting, level = (self.waiting[first - 1], self.level[first - 1]) if first else (0, 0)
        for slot in range(first, len(self.kind)):
            kind = self.kind[slot]
            if kind == _F:
                level += 1
                if level > limit:
                    return False
            elif kind == _I:
                waiting += 1
            elif waiting:
                waiting, level = waiting - 1, level - 1
            if slot > last and (waiting, level) == (self.waiting[slot], self.level[slot]):
                break
            self.waiting[slot], self.level[slot] = waiting, level
        return True

    def moved(self, slot: int, first: int, limit: int) -> int:
        """Move the pass at `slot` to the first gap from `first` on with which the limit holds; returns its slot."""
        kind, target = self.kind[slot], self.kind.find(_GAP, first, slot)
        if target < 0:
            return slot
        start, waiting, level = target, self.waiting[target:], self.level[target:]
        self.kind[slot] = _GAP
        while target >= 0:
            self.kind[target] = kind
            if self._run(start, slot, limit):  # from the first gap that was tried, which W may fill again
                return target
            self.kind[target] = _GAP
            self.waiting[start:], self.level[start:] = waiting, level
            target = self.kind.find(_GAP, target + 1, slot)
        self.kind[slot] = kind
        return slot


def _orders(slots: Integers) -> list[Order]:
    """The orders: F and I by their slots, and in the gaps W, those of the stage on the way up first."""
    _, ranks, microbatches = slots.shape
    weights = _weight_slots(slots)
    return [_order(slots[:, rank], weights[rank], rank, ranks, microbatches) for rank in range(ranks)]


def _order(slots: Integers, weights: Integers, rank: int, ranks: int, microbatches: int) -> Order:
    """One rank's order."""
    number = np.arange(microbatches)
    down, up = np.full(microbatches, rank), np.full(microbatches, 2 * ranks - 1 - rank)
    # Which W takes each slot: of those whose I has run, one of the way up before one of the way down.
    is_up = np.zeros(len(weights), bool)
    ready = np.searchsorted(np.sort(slots[BACKWARD_UP]), weights)  # I of the way up before each W's slot
    done = 0
    for at in range(len(weights)):
        if ready[at] > done:
            is_up[at] = True
            done += 1
    weight_stage = np.where(is_up, up[0], down[0])
    weight_number = np.where(is_up, np.cumsum(is_up) - 1, np.cumsum(~is_up) - 1)
    stage = np.concatenate([down, up, up, down, weight_stage])
    kind = np.repeat([Kind.F, Kind.I, Kind.W], 2 * microbatches)
    microbatch = np.concatenate([number, number, number, number, weight_number])
    by_slot = np.argsort(np.concatenate([slots.ravel(), weights]), kind="stable")
    return Order(stage[by_slot], kind[by_slot], microbatch[by_slot])
