"""Partial steps: what a step may look like after its first actions, layer by layer; compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.plan_times import B, F, I, W, receiver
from ppsim.order_search.problem import Integers

_NOTHING = -1
_FAR = 1 << 60  # later than anything


class Clockwork(NamedTuple):
    """A problem in whole ticks: S stages, p ranks, m microbatches. Fields as in `ppsim.order_search.problem.Tables`.

    Machine code knows the fields by position.

    Parameters
    ----------
    duration : (4, S)
        In ticks, rounded down; the row is the `Kind`.
    least, work : (S,)
        b and w of `ppsim.order_search.lower_bound.lower_bound_s`, in ticks.
    held, kept, rank, first, stages, link
        As in `Tables`.
    occupied, latency : (2, S)
        In ticks, rounded down.
    links : int
        How many links keep a time; 0 where no message occupies one.
    limit : (p,)
        Bytes.
    begin : (p,)
        What counts as the beginning of each rank's time, in ticks.
    back : (S,)
        From the start of the backward on a stage to that on stage 0, at least; 0 where the objective is a rank's time.
    cap : (S,)
        The most microbatches between F and the end of the backward.
    slots : (p,)
        The most microbatches between F on the rank's first stage and the end of the backward on its last.
    is_tight : (p,)
        Whether the rank has one stage and what a W waits with does not fit beside `slots` microbatches.
    may_fuse, may_split : bool
        Whether a B may be better than I and W, and whether what I leaves is no more than what it releases.
    microbatches, by_rank_time
        As in `Tables`.
    """

    duration: Integers
    least: Integers
    work: Integers
    held: Integers
    kept: Integers
    rank: Integers
    first: Integers
    stages: Integers
    link: Integers
    occupied: Integers
    latency: Integers
    links: int
    limit: Integers
    begin: Integers
    back: Integers
    cap: Integers
    slots: Integers
    is_tight: npt.NDArray[np.bool_]
    may_fuse: bool
    may_split: bool
    microbatches: int
    by_rank_time: bool


class Layer(NamedTuple):
    """Partial steps with one number of actions, found by how many actions of each kind every stage has run.

    Parameters
    ----------
    counts : (room, 3, S)
        F, backwards and W that have been run.
    time : (room, p + links + outstanding)
        When each rank and link is free, and when the messages that wait arrive: by stage, F before backwards.
    bound : (room,)
        No step that begins like this one has a smaller objective.
    parent, action : (room,)
        The entry of an earlier layer that it came from, and the action that was added: 4 stage + kind.
    following : (room,)
        The next entry of the same bucket; -1 for none.
    is_alive : (room,)
        Whether the entry counts: no other is at least as good.
    bucket : (buckets,)
        The first entry of each bucket. How many there are is a power of two.
    length : (1,)
        How many entries there are.
    """

    counts: npt.NDArray[np.int16]
    time: Integers
    bound: Integers
    parent: npt.NDArray[np.int32]
    action: npt.NDArray[np.int16]
    following: npt.NDArray[np.int32]
    is_alive: npt.NDArray[np.bool_]
    bucket: npt.NDArray[np.int32]
    length: Integers


class Desk(NamedTuple):
    """Room to work in for `expand`."""

    counts: npt.NDArray[np.int16]  # (3, S)
    arrival: Integers  # (2, S, m)
    child_counts: npt.NDArray[np.int16]  # (3, S)
    child_arrival: Integers  # (2, S, m)
    child_time: Integers  # (p + links + outstanding,)
    forward_end: Integers  # (S,)
    backward_end: Integers  # (m, S)
    backward_free: Integers  # (S,)
    start: Integers  # (4, S): when each action could start; _FAR: not now


@kernel
def expand(
    clock: Clockwork, layer: Layer, index: Integers, one: Layer, two: Layer, desk: Desk, goal: int
) -> int:  # fmt: skip
    """Add every action that may come next to each of the entries.

    Parameters
    ----------
    clock : Clockwork
    layer : Layer
        The entries.
    index : (n,)
        Which of them.
    one, two : Layer
        Filled in: those with one action more, and with a B, which counts as two.
    desk : Desk
        Room to work in.
    goal : int
        Entries whose bound is as large are left out.

    Returns
    -------
    int
        How many entries were expanded; fewer than n where the room of a layer came to its end.

    Notes
    -----
    The next action is the one that starts next in time; so every step is built in one way only, but for equal starts.
    An action that would start after another could have ended is left out, if that other takes no memory: a step in
    which the other comes first is no worse.
    """
    stages, ranks, m = len(clock.rank), len(clock.limit), clock.microbatches
    room, most_children = min(len(one.bound), len(two.bound)), 4 * stages
    for n in range(len(index)):
        if max(one.length[0], two.length[0]) + most_children > room:
            return n
        parent = index[n]
        if not layer.is_alive[parent] or layer.bound[parent] >= goal:
            continue
        count = desk.counts
        count[:] = layer.counts[parent]
        _unpack(clock, layer.time[parent], count, desk.arrival)
        free = layer.time[parent]
        for r in range(ranks):
            level, oldest, reserved = 0, m, 0
            for i in range(clock.first[r], clock.first[r + 1]):
                s = clock.stages[i]
                level += clock.held[s] * (count[0, s] - count[1, s]) + clock.kept[s] * (count[1, s] - count[2, s])
                oldest = min(oldest, count[1, s])
            for i in range(clock.first[r], clock.first[r + 1]):
                s = clock.stages[i]
                if count[0, s] <= oldest:
                    reserved += clock.held[s]
            unqueued = level
            for i in range(clock.first[r], clock.first[r + 1]):
                s = clock.stages[i]
                unqueued -= clock.kept[s] * (count[1, s] - count[2, s])
            for i in range(clock.first[r], clock.first[r + 1]):
                s = clock.stages[i]
                for k in range(4):
                    desk.start[k, s] = _FAR
                b = count[0, s]
                if b < m and (s == 0 or count[0, s - 1] > b) and level + clock.held[s] <= clock.limit[r]:
                    others = reserved - clock.held[s] if b <= oldest else reserved
                    if unqueued + clock.held[s] + others <= clock.limit[r]:
                        desk.start[F, s] = free[r] if s == 0 else max(free[r], desk.arrival[0, s, b])
                b = count[1, s]
                if b < count[0, s] and (s == stages - 1 or count[1, s + 1] > b):
                    at = free[r] if s == stages - 1 else max(free[r], desk.arrival[1, s, b])
                    if level + clock.kept[s] - clock.held[s] <= clock.limit[r]:
                        desk.start[I, s] = at
                    if clock.may_fuse:
                        desk.start[B, s] = at
                if count[2, s] < count[1, s]:
                    desk.start[W, s] = free[r]
        # What can end before another action starts comes first, if it takes no memory.
        earliest = _FAR
        for s in range(stages):
            if desk.start[W, s] < _FAR:
                earliest = min(earliest, desk.start[W, s] + max(1, clock.duration[W, s]))
            if clock.may_split and desk.start[I, s] < _FAR:
                longest = clock.duration[I, s]
                if clock.may_fuse:
                    longest = max(longest, clock.duration[B, s])
                earliest = min(earliest, desk.start[I, s] + max(1, longest))
        for s in range(stages):
            for k in range(4):
                if desk.start[k, s] < earliest:
                    _add(clock, layer, parent, k, s, two if k == B else one, desk, goal)
    return len(index)


@kernel_part
def _unpack(clock: Clockwork, time: Integers, count: npt.NDArray[np.int16], arrival: Integers) -> None:
    """Write when the messages that wait arrive into `arrival` (2, S, m)."""
    at, stages = len(clock.limit) + clock.links, len(clock.rank)
    for s in range(stages):
        if s > 0:
            for b in range(count[0, s], count[0, s - 1]):
                arrival[0, s, b] = time[at]
                at += 1
        if s + 1 < stages:
            for b in range(count[1, s], count[1, s + 1]):
                arrival[1, s, b] = time[at]
                at += 1


@kernel_part
def _add(
    clock: Clockwork, layer: Layer, parent: int, k: int, s: int, target_layer: Layer, desk: Desk, goal: int
) -> None:  # fmt: skip
    """Add the entry that follows when an action of kind k runs on stage s."""
    stages, ranks = len(clock.rank), len(clock.limit)
    count, time, start, r = desk.child_counts, desk.child_time, desk.start[k, s], clock.rank[s]
    for row in range(3):
        for stage in range(stages):
            count[row, stage] = desk.counts[row, stage]
    for i in range(ranks + clock.links):
        time[i] = layer.time[parent, i]
    end = start + clock.duration[k, s]
    time[r] = end
    if k == F:
        count[0, s] += 1
    if k in (B, I):
        count[1, s] += 1
    if k in (B, W):
        count[2, s] += 1
    direction, target = receiver(k, s, stages)
    sent_b = -1
    if target >= 0:
        sent_b = desk.counts[direction, s]
        there = end
        link = clock.link[direction, s]
        if link >= 0:
            if clock.links > 0:
                there = max(there, time[ranks + link])
                there += clock.occupied[direction, s]
                time[ranks + link] = there
            there += clock.latency[direction, s]
        desk.arrival[direction, target, sent_b] = there
    # Nothing starts before this action does, so earlier times are all one.
    for other in range(ranks):
        left = False
        for i in range(clock.first[other], clock.first[other + 1]):
            left = left or count[2, clock.stages[i]] < clock.microbatches
        if left or not clock.by_rank_time:
            time[other] = max(time[other], start)
    if clock.links > 0:
        for sender in range(stages):
            for way in range(2):
                link = clock.link[way, sender]
                if link >= 0:
                    time[ranks + link] = max(time[ranks + link], time[clock.rank[sender]])
    at = ranks + clock.links
    for stage in range(stages):
        own = time[clock.rank[stage]]
        if stage > 0:
            for b in range(count[0, stage], count[0, stage - 1]):
                time[at] = max(own, desk.arrival[0, stage, b])
                at += 1
        if stage + 1 < stages:
            for b in range(count[1, stage], count[1, stage + 1]):
                time[at] = max(own, desk.arrival[1, stage, b])
                at += 1
    bound = max(layer.bound[parent], _bound(clock, count, time, desk, goal))
    if bound < goal:
        _insert(target_layer, count, time, at, bound, parent, 4 * s + k)


@kernel_part
def _bound(clock: Clockwork, count: npt.NDArray[np.int16], time: Integers, desk: Desk, goal: int) -> int:
    """What no step that begins like this has less than: ranks as if they could run many actions of a stage at once."""
    stages, ranks, m = len(clock.rank), len(clock.limit), clock.microbatches
    bound, first_b = 0, m
    for s in range(stages):
        first_b = min(first_b, count[1, s])
    # 1. The work that each rank has still to do, all of it, and that before its last backward.
    for r in range(ranks):
        forwards, work, waiting, s1 = 0, 0, 0, clock.stages[clock.first[r]]
        for i in range(clock.first[r], clock.first[r + 1]):
            s = clock.stages[i]
            forwards += (m - count[0, s]) * clock.duration[F, s]
            work += (m - count[1, s]) * clock.work[s] + (count[1, s] - count[2, s]) * clock.duration[W, s]
            # At most this much of the W may come after the last backward.
            most = m - count[2, s]
            if clock.kept[s] > 0:
                most = min(most, clock.limit[r] // clock.kept[s])
            waiting += most * max(clock.work[s] - clock.duration[I, s], clock.duration[W, s])
        bound = max(bound, time[r] + forwards + work - clock.begin[r])
        if clock.back[s1] > 0 and count[1, s1] < m:
            bound = max(bound, time[r] + forwards + work - waiting + clock.back[s1] - clock.least[s1] + clock.work[0])
        if bound >= goal:
            return int(bound)
    # 2. Every microbatch down and up again, each stage one at a time, as many as memory holds.
    _unpack(clock, time, count, desk.child_arrival)
    for s in range(stages):
        desk.forward_end[s] = time[clock.rank[s]]
        desk.backward_free[s] = time[clock.rank[s]]
    for b in range(first_b, m):
        chain = 0
        for s in range(stages):
            if b < count[0, s]:
                chain = 0
                continue
            r = clock.rank[s]
            if s > 0 and b < count[0, s - 1]:
                chain = desk.child_arrival[0, s, b]
            start = max(desk.forward_end[s], chain)
            start = max(start, _released(desk, count, s, b - clock.cap[s], time[r]))
            if s == clock.stages[clock.first[r]]:
                last = clock.stages[clock.first[r + 1] - 1]
                earlier = b - clock.slots[r]
                if clock.is_tight[r]:
                    weight = _released(desk, count, last, earlier, time[r])
                    if earlier >= count[1, last]:
                        weight += clock.work[last] - clock.least[last]
                    if earlier >= 0:
                        start = max(start, min(weight, _released(desk, count, last, earlier + 1, time[r])))
                else:
                    start = max(start, _released(desk, count, last, earlier, time[r]))
            end = start + clock.duration[F, s]
            desk.forward_end[s] = end
            chain = end
            if clock.link[0, s] >= 0:
                chain += clock.occupied[0, s] + clock.latency[0, s]
        chain = 0
        for s in range(stages - 1, -1, -1):
            if b < count[1, s]:
                chain = 0
                continue
            if s + 1 < stages and b < count[1, s + 1]:
                chain = desk.child_arrival[1, s, b]
            start = max(desk.backward_free[s], chain)
            if b >= count[0, s]:
                start = max(start, desk.forward_end[s])
            end = start + clock.least[s]
            desk.backward_free[s] = end
            desk.backward_end[b, s] = end
            chain = end
            if clock.link[1, s] >= 0:
                chain += clock.occupied[1, s] + clock.latency[1, s]
            bound = max(bound, start + clock.work[s] - clock.begin[clock.rank[s]])
        if bound >= goal:
            return bound
    return bound


@kernel_part
def _released(desk: Desk, count: npt.NDArray[np.int16], s: int, b: int, now: int) -> int:
    """When the backward of microbatch b on stage s has ended, at least."""
    if b < 0 or b < count[1, s]:
        return now
    return int(desk.backward_end[b, s])


@kernel_part
def _insert(
    layer: Layer, count: npt.NDArray[np.int16], time: Integers, length: int, bound: int, parent: int, action: int
) -> None:  # fmt: skip
    """Add an entry, unless another is as good; entries that are worse than it go."""
    code = np.uint64(14695981039346656037)
    for row in range(3):
        for s in range(count.shape[1]):
            code = (code ^ np.uint64(count[row, s])) * np.uint64(1099511628211)
    code ^= code >> np.uint64(29)
    bucket = np.int64(code & np.uint64(len(layer.bucket) - 1))
    entry = np.int64(layer.bucket[bucket])
    while entry != _NOTHING:
        if layer.is_alive[entry] and _is_same(layer.counts[entry], count):
            is_later, is_earlier = True, True
            for i in range(length):
                is_later = is_later and time[i] >= layer.time[entry, i]
                is_earlier = is_earlier and time[i] <= layer.time[entry, i]
            if is_later:
                return
            if is_earlier:
                layer.is_alive[entry] = False
        entry = np.int64(layer.following[entry])
    new = layer.length[0]
    layer.length[0] += 1
    for row in range(3):
        for s in range(count.shape[1]):
            layer.counts[new, row, s] = count[row, s]
    for i in range(length):
        layer.time[new, i] = time[i]
    layer.bound[new] = bound
    layer.parent[new] = parent
    layer.action[new] = action
    layer.is_alive[new] = True
    layer.following[new] = layer.bucket[bucket]
    layer.bucket[bucket] = new


@kernel_part
def _is_same(one: npt.NDArray[np.int16], other: npt.NDArray[np.int16]) -> bool:
    """Whether two counts are equal."""
    for row in range(one.shape[0]):
        for s in range(one.shape[1]):
            if one[row, s] != other[row, s]:
                return False
    return True
