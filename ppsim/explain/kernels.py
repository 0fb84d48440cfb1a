"""Kernels: the passes over a step's actions, one after the other, in machine code.

Each takes the wiring's arrays (`explain.graph.Wiring`) and writes into the arrays that it is given. Compiled once per
machine, then cached; numba takes a while to import, so this module is imported by who runs a pass.
"""

from __future__ import annotations

import math

import numpy as np

from ppsim.kernel_cache import kernel

_FIRST_ROOM = 8  # pieces of idle time that a rank has room for at first
_COMPUTE, _QUEUE, _TRANSFER, _LATENCY, _DEVICE = range(5)  # as in `explain.waits.Cause`


@kernel
def replay(
    order,
    previous,
    inputs,
    outputs,
    ahead,
    compute,
    device,
    post,
    occupied,
    latency,
    ready,
    start,
    end,
    message_ready,
    message_start,
    left,
    arrival,
):
    """The longest path through the wiring; see `explain.graph.replay`. Writes the last seven."""
    for action in order:
        before = previous[action]
        now = end[before] if before >= 0 else 0.0
        for place in range(2):
            message = inputs[action, place]
            if message >= 0 and arrival[message] > now:
                now = arrival[message]
        ready[action] = now
        now = now + device[action]
        start[action] = now
        now = now + compute[action]
        end[action] = now
        for place in range(2):
            message = outputs[action, place]
            if message < 0:
                break
            begin, front = now, ahead[message]
            if front >= 0 and left[front] > begin:
                begin = left[front]
            message_ready[message] = begin
            begin = begin + post[message]
            message_start[message] = begin
            begin = begin + occupied[message]
            left[message] = begin
            arrival[message] = begin + latency[message]


@kernel
def flow(order, previous, inputs, outputs, ahead, ready, end, message_ready, left, arrival, tie, weight, on_link, late):
    """One unit sent back along the critical paths; see `explain.change`. Adds to the last three, which are zero."""
    length = end.max()
    count = 0
    for action in range(len(end)):
        if end[action] >= length - tie:
            count += 1
    for action in range(len(end)):
        if end[action] >= length - tie:
            weight[action] = 1.0 / count
    for index in range(len(order) - 1, -1, -1):
        action = order[index]
        for place in range(1, -1, -1):
            message = outputs[action, place]
            if message < 0:
                continue
            on_link[message] += late[message]
            crossing = on_link[message]
            if crossing == 0.0:
                continue
            bound, front = message_ready[message] - tie, ahead[message]
            is_behind = front >= 0 and left[front] >= bound
            is_own = end[action] >= bound
            share = crossing / (int(is_behind) + int(is_own))
            if is_behind:
                on_link[front] += share
            if is_own:
                weight[action] += share
        crossing = weight[action]
        if crossing == 0.0:
            continue
        before, bound = previous[action], ready[action] - tie
        is_free_late = (end[before] if before >= 0 else 0.0) >= bound
        binding = int(is_free_late)
        for place in range(2):
            message = inputs[action, place]
            if message >= 0 and arrival[message] >= bound:
                binding += 1
        share = crossing / binding
        if is_free_late and before >= 0:
            weight[before] += share
        for place in range(2):
            message = inputs[action, place]
            if message >= 0 and arrival[message] >= bound:
                late[message] += share


@kernel
def slack(order, previous, consumer, outputs, ahead, ready, end, message_ready, left, arrival, found):
    """By how much each action could end later; see `explain.critical_path.slack_of`. Writes `found`."""
    last = end.max()
    for action in range(len(end)):
        found[action] = last - end[action]
    of_message = np.full(len(left), math.inf)  # of a message's leaving its link
    for index in range(len(order) - 1, -1, -1):
        action = order[index]
        for place in range(1, -1, -1):
            message = outputs[action, place]
            if message < 0:
                continue
            receiver = consumer[message]
            need = min(of_message[message], found[receiver] + (ready[receiver] - arrival[message]))
            begun, front = message_ready[message], ahead[message]
            found[action] = min(found[action], need + (begun - end[action]))
            if front >= 0:
                of_message[front] = min(of_message[front], need + (begun - left[front]))
        before = previous[action]
        if before >= 0:
            found[before] = min(found[before], found[action] + (ready[action] - end[before]))


@kernel
def waits(
    order,
    rank_of,
    inputs,
    producer,
    start,
    end,
    message_start,
    shown_left,
    arrival,
    step_end,
    free_of_rank,
    before,
    after,
):
    """Every wait followed to its root, moment by moment; see `explain.waits.follow_waits`. Writes the last three.

    A rank's idle time so far is a list of pieces (begin, end, cause), in time; pieces that touch and agree are one.
    The lists lie in one table, rank r's at place[r, 0], with place[r, 1] pieces and room for place[r, 2].
    """
    ranks = len(free_of_rank)
    pieces = np.empty((4 * _FIRST_ROOM * ranks, 3))
    place = np.empty((ranks + 1, 3), np.int64)  # the last row: where the table is free
    for rank in range(ranks):
        place[rank, 0], place[rank, 1], place[rank, 2] = rank * _FIRST_ROOM, 0, _FIRST_ROOM
    place[ranks, 0] = ranks * _FIRST_ROOM
    for action in order:
        rank = rank_of[action]
        free, now = free_of_rank[rank], start[action]
        if now > free:
            sums = before[action]
            message = inputs[action, 0]
            other = inputs[action, 1]
            if other >= 0 and arrival[other] > arrival[message]:
                message = other
            at = free
            if message >= 0 and arrival[message] > free:
                source = producer[message]
                until = min(max(end[source], at), now)
                if until > at:
                    pieces = _copy(pieces, place, rank, rank_of[source], at, until, sums)
                at = until
                until = min(max(message_start[message], at), now)
                pieces = _add(pieces, place, rank, at, until, _QUEUE, sums)
                at = until
                until = min(max(shown_left[message], at), now)
                pieces = _add(pieces, place, rank, at, until, _TRANSFER, sums)
                at = until
                until = min(max(arrival[message], at), now)
                pieces = _add(pieces, place, rank, at, until, _LATENCY, sums)
                at = until
            pieces = _add(pieces, place, rank, at, now, _DEVICE, sums)
        free_of_rank[rank] = max(free, end[action])
    last = rank_of[np.argmax(end)]
    for rank in range(ranks):
        if free_of_rank[rank] < step_end:
            pieces = _copy(pieces, place, rank, last, free_of_rank[rank], step_end, after[rank])


@kernel
def _add(pieces, place, rank, begin, end, cause, sums):
    """Append a piece to the rank's and add its length to the cause's sum; one without length is left out."""
    if end <= begin:
        return pieces
    sums[cause] += end - begin
    offset, count = place[rank, 0], place[rank, 1]
    if count > 0 and pieces[offset + count - 1, 1] >= begin and pieces[offset + count - 1, 2] == cause:
        pieces[offset + count - 1, 1] = end
        return pieces
    if count == place[rank, 2]:
        pieces = _with_room(pieces, place, rank)
        offset = place[rank, 0]
    pieces[offset + count, 0] = begin
    pieces[offset + count, 1] = end
    pieces[offset + count, 2] = cause
    place[rank, 1] = count + 1
    return pieces


@kernel
def _with_room(pieces, place, rank):
    """Move the rank's pieces to the table's free end, with room for twice as many."""
    offset, count = place[rank, 0], place[rank, 1]
    room = 2 * place[rank, 2]
    free = place[-1, 0]
    if free + room > len(pieces):
        larger = np.empty((2 * (free + room), 3))
        larger[:free] = pieces[:free]
        pieces = larger
    pieces[free : free + count] = pieces[offset : offset + count]
    place[rank, 0], place[rank, 2] = free, room
    place[-1, 0] = free + room
    return pieces


@kernel
def _copy(pieces, place, rank, other, begin, end, sums):
    """Append what the other rank does between two moments: its causes where it is idle, COMPUTE where it is not."""
    at = begin
    low, count = 0, place[other, 1]
    high = count
    while low < high:  # the first piece that ends after `begin`
        middle = (low + high) // 2
        if pieces[place[other, 0] + middle, 1] > begin:
            high = middle
        else:
            low = middle + 1
    for index in range(low, count):
        # Adding may have moved the other's pieces, if the two ranks are one.
        piece_begin, piece_end, cause = pieces[place[other, 0] + index]
        if piece_begin >= end:
            break
        pieces = _add(pieces, place, rank, at, max(piece_begin, at), _COMPUTE, sums)
        at = max(at, piece_begin)
        until = min(piece_end, end)
        pieces = _add(pieces, place, rank, at, until, int(cause), sums)
        at = until
    return _add(pieces, place, rank, at, end, _COMPUTE, sums)
