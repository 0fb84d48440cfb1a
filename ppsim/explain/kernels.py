"""Kernels: passes over all actions of a step, compiled.

A pass takes the named tuples of `explain.step_graph` as they are, and writes into the arrays that it is given. Numba
takes a second to import, so this module is imported only where a pass is run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ppsim.kernel_cache import kernel, kernel_part

if TYPE_CHECKING:
    from ppsim.explain.change import PathWeights
    from ppsim.explain.step_graph import EdgeTimes, GraphTimes, Seconds
    from ppsim.explain.waits import Waits
    from ppsim.explain.wiring import Integers, Wiring

_FIRST_ROOM = 8  # intervals of idle time that a rank has room for at first; doubled whenever it is full
_COMPUTE, _QUEUE, _STREAM, _TRANSFER, _LATENCY, _DEVICE, _COLLECTIVE, _COPY = range(8)  # as in `explain.waits.Cause`


@kernel
def replay(wiring: Wiring, edge_times: EdgeTimes, times: GraphTimes) -> None:
    """Fill in the start and end of every action and message: the longest path to it."""
    actions = len(wiring.rank)
    for action in wiring.order:
        if action >= actions:
            _replay_message(wiring, edge_times, times, action - actions)
            continue
        before = wiring.previous[action]
        now = times.end_s[before] if before >= 0 else 0.0
        for place in range(2):
            message = wiring.inputs[action, place]
            if message >= 0 and times.arrival_s[message] > now:
                now = times.arrival_s[message]
        times.ready_s[action] = now
        now = now + edge_times.device_s[action]
        times.start_s[action] = now
        now = now + edge_times.compute_s[action]
        times.end_s[action] = now


@kernel_part
def _replay_message(wiring: Wiring, edge_times: EdgeTimes, times: GraphTimes, message: int) -> None:
    """Fill in the times of one message: it begins after its posts, and after the messages ahead at both ends."""
    now = times.end_s[wiring.sent_after[message]]
    posted = wiring.received_after[message]
    if posted >= 0 and times.end_s[posted] > now:
        now = times.end_s[posted]
    for place in range(2):
        front = wiring.ahead[message, place]
        if front >= 0 and times.left_s[front] > now:
            now = times.left_s[front]
    times.message_ready_s[message] = now
    now = now + edge_times.post_s[message]
    times.message_start_s[message] = now
    now = now + edge_times.occupied_s[message]
    times.left_s[message] = now
    times.arrival_s[message] = now + edge_times.latency_s[message]


@kernel
def trace_back(wiring: Wiring, times: GraphTimes, tie_s: float, weights: PathWeights) -> None:
    """Send one unit back from the step's end along all critical paths, and note how much of it crosses what.

    A unit that reaches an action goes on to what the action waited for: the action before it on its rank, or a message.
    One that reaches a message goes on to its posts, and to the messages ahead.
    Where several were equally late (within `tie_s`) it is parted equally. `weights` holds zeros and is added to.
    """
    end_s, weight = times.end_s, weights.action
    length_s = end_s.max()
    count = 0
    for action in range(len(end_s)):
        if end_s[action] >= length_s - tie_s:
            count += 1
    for action in range(len(end_s)):
        if end_s[action] >= length_s - tie_s:
            weight[action] = 1.0 / count
    actions = len(wiring.rank)
    for index in range(len(wiring.order) - 1, -1, -1):
        action = wiring.order[index]
        if action >= actions:
            _trace_message(wiring, times, tie_s, weights, action - actions)
            continue
        crossing = weight[action]
        if crossing == 0.0:
            continue
        before, bound = wiring.previous[action], times.ready_s[action] - tie_s
        is_free_late = (end_s[before] if before >= 0 else 0.0) >= bound
        binding = int(is_free_late)
        for place in range(2):
            message = wiring.inputs[action, place]
            if message >= 0 and times.arrival_s[message] >= bound:
                binding += 1
        share = crossing / binding
        if is_free_late and before >= 0:
            weight[before] += share
        for place in range(2):
            message = wiring.inputs[action, place]
            if message >= 0 and times.arrival_s[message] >= bound:
                weights.latency[message] += share


@kernel_part
def _trace_message(wiring: Wiring, times: GraphTimes, tie_s: float, weights: PathWeights, message: int) -> None:
    """Hand on what has reached a message to what it waited for."""
    weights.link[message] += weights.latency[message]
    crossing = weights.link[message]
    if crossing == 0.0:
        return
    bound = times.message_ready_s[message] - tie_s
    sent, posted = wiring.sent_after[message], wiring.received_after[message]
    is_sent_late = times.end_s[sent] >= bound
    is_posted_late = posted >= 0 and posted != sent and times.end_s[posted] >= bound
    binding = int(is_sent_late) + int(is_posted_late)
    for place in range(2):
        front = wiring.ahead[message, place]
        if front >= 0 and times.left_s[front] >= bound:
            binding += 1
    share = crossing / binding
    if is_sent_late:
        weights.action[sent] += share
    if is_posted_late:
        weights.action[posted] += share
    for place in range(2):
        front = wiring.ahead[message, place]
        if front >= 0 and times.left_s[front] >= bound:
            weights.link[front] += share


@kernel
def find_slack(wiring: Wiring, times: GraphTimes, slack_s: Seconds) -> None:
    """Fill in by how much each action could end later without a longer step, from the last action to the first."""
    end_s, arrival_s, left_s = times.end_s, times.arrival_s, times.left_s
    step_end_s = end_s.max()
    for action in range(len(end_s)):
        slack_s[action] = step_end_s - end_s[action]
    link_slack_s = np.full(len(left_s), math.inf)  # by how much each message could leave its link later
    actions = len(end_s)
    for index in range(len(wiring.order) - 1, -1, -1):
        action = wiring.order[index]
        if action >= actions:
            message = action - actions
            receiver = wiring.consumer[message]
            # By how much it could begin later: for its receiver's sake, and for that of the messages behind it.
            need_s = min(link_slack_s[message], slack_s[receiver] + (times.ready_s[receiver] - arrival_s[message]))
            begun_s = times.message_ready_s[message]
            for poster in (wiring.sent_after[message], wiring.received_after[message]):
                if poster >= 0:
                    slack_s[poster] = min(slack_s[poster], need_s + (begun_s - end_s[poster]))
            for place in range(2):
                front = wiring.ahead[message, place]
                if front >= 0:
                    link_slack_s[front] = min(link_slack_s[front], need_s + (begun_s - left_s[front]))
            continue
        before = wiring.previous[action]
        if before >= 0:
            slack_s[before] = min(slack_s[before], slack_s[action] + (times.ready_s[action] - end_s[before]))


@kernel
def split_waits(
    wiring: Wiring,
    times: GraphTimes,
    queued_until_s: Seconds,
    shown_left_s: Seconds,
    gathered_s: Seconds,
    loaded_s: Seconds,
    step_end_s: float,
    waits: Waits,
) -> None:
    """Add up every wait by what it comes from, moment by moment; see `explain.waits.follow_waits`.

    `waits` holds zeros and is added to. For every rank its idle time so far is kept as a list of intervals (begin, end,
    cause) in time, so that a rank that waits for this one can look up what this one did meanwhile. The lists lie in one
    table `idle`: rank r's begins at place[r, 0], has place[r, 1] intervals, and has room for place[r, 2].
    """
    ranks = len(waits.after_s)
    free_s = np.zeros(ranks)
    idle = np.empty((4 * _FIRST_ROOM * ranks, 3))
    place = np.empty((ranks + 1, 3), np.int64)  # place[ranks, 0]: from where on the table is free
    for rank in range(ranks):
        place[rank, 0], place[rank, 1], place[rank, 2] = rank * _FIRST_ROOM, 0, _FIRST_ROOM
    place[ranks, 0] = ranks * _FIRST_ROOM
    for action in wiring.order:
        if action >= len(wiring.rank):
            continue
        rank = wiring.rank[action]
        free, now = free_s[rank], times.start_s[action]
        if now > free:
            sums = waits.before_s[action]
            # Of two inputs the later one is waited for.
            message = wiring.inputs[action, 0]
            other = wiring.inputs[action, 1]
            if other >= 0 and times.arrival_s[other] > times.arrival_s[message]:
                message = other
            at = free
            if message >= 0 and times.arrival_s[message] > free:
                # Until the producer ends: whatever the producer's rank does. Then the message itself.
                source = wiring.producer[message]
                until = min(max(times.end_s[source], at), now)
                if until > at:
                    idle = _copy(idle, place, rank, wiring.rank[source], at, until, sums)
                at = until
                until = min(max(queued_until_s[message], at), now)
                idle = _add(idle, place, rank, at, until, _QUEUE, sums)
                at = until
                until = min(max(times.message_start_s[message], at), now)
                idle = _add(idle, place, rank, at, until, _STREAM, sums)
                at = until
                until = min(max(shown_left_s[message], at), now)
                idle = _add(idle, place, rank, at, until, _TRANSFER, sums)
                at = until
                until = min(max(times.arrival_s[message], at), now)
                idle = _add(idle, place, rank, at, until, _LATENCY, sums)
                at = until
            until = min(max(gathered_s[action], at), now)
            idle = _add(idle, place, rank, at, until, _COLLECTIVE, sums)
            at = until
            until = min(max(loaded_s[action], at), now)
            idle = _add(idle, place, rank, at, until, _COPY, sums)
            at = until
            idle = _add(idle, place, rank, at, now, _DEVICE, sums)
        free_s[rank] = max(free, times.end_s[action])
    last = wiring.rank[np.argmax(times.end_s)]
    for rank in range(ranks):
        if free_s[rank] < step_end_s:
            idle = _copy(idle, place, rank, last, free_s[rank], step_end_s, waits.after_s[rank])


@kernel
def _add(idle: Seconds, place: Integers, rank: int, begin: float, end: float, cause: int, sums: Seconds) -> Seconds:
    """Append an interval to the rank's list and add its length to the cause's sum. Intervals that touch are joined."""
    if end <= begin:
        return idle
    sums[cause] += end - begin
    offset, count = place[rank, 0], place[rank, 1]
    if count > 0 and idle[offset + count - 1, 1] >= begin and idle[offset + count - 1, 2] == cause:
        idle[offset + count - 1, 1] = end
        return idle
    if count == place[rank, 2]:
        idle = _with_room(idle, place, rank)
        offset = place[rank, 0]
    idle[offset + count, 0] = begin
    idle[offset + count, 1] = end
    idle[offset + count, 2] = cause
    place[rank, 1] = count + 1
    return idle


@kernel
def _with_room(idle: Seconds, place: Integers, rank: int) -> Seconds:
    """Move the rank's list to the table's free end, with room for twice as many intervals."""
    offset, count = place[rank, 0], place[rank, 1]
    room = 2 * place[rank, 2]
    free = place[-1, 0]
    if free + room > len(idle):
        larger = np.empty((2 * (free + room), 3))
        larger[:free] = idle[:free]
        idle = larger
    idle[free : free + count] = idle[offset : offset + count]
    place[rank, 0], place[rank, 2] = free, room
    place[-1, 0] = free + room
    return idle


@kernel
def _copy(idle: Seconds, place: Integers, rank: int, other: int, begin: float, end: float, sums: Seconds) -> Seconds:
    """Append what the other rank does between two moments: its causes where it is idle, COMPUTE where it is not."""
    at = begin
    low, count = 0, place[other, 1]
    high = count
    while low < high:  # the first interval that ends after `begin`
        middle = (low + high) // 2
        if idle[place[other, 0] + middle, 1] > begin:
            high = middle
        else:
            low = middle + 1
    for index in range(low, count):
        # Read anew in every round: adding may have moved the list, if both ranks are the same.
        idle_begin, idle_end, cause = idle[place[other, 0] + index]
        if idle_begin >= end:
            break
        idle = _add(idle, place, rank, at, max(idle_begin, at), _COMPUTE, sums)
        at = max(at, idle_begin)
        until = min(idle_end, end)
        idle = _add(idle, place, rank, at, until, int(cause), sums)
        at = until
    return _add(idle, place, rank, at, end, _COMPUTE, sums)
