"""Evaluate: when every action of a plan runs, by longest path, compiled.

A plan in the kernels is four arrays: kind (p, A) int8, stage (p, A) int32, microbatch (p, A) int32 and length (p,)
int64; row r is rank r's order, its first length[r] entries count. `joined` (p, A) marks the forward of an overlapped
pair, whose backward is the next entry.
"""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel

F, B, I, W = 0, 1, 2, 3  # noqa: E741  (the kinds as numbers, which the kernels compare)


@kernel
def run_plan(tables, microbatches, kind, stage, microbatch, joined, length, start, end):
    """Fill start and end (p, A), in seconds, as `ppsim.simulate` would; False if the plan would wait for ever.

    Ranks advance as far as they can and stop at an input that is not there yet; whoever brings it wakes them. The
    sums are taken in the simulator's order, so that the floats are the same.
    """
    rank_of, duration, links = tables.rank, tables.duration, tables.links[0]
    ahead_link, ahead_occupied, ahead_latency = tables.ahead_link, tables.ahead_occupied, tables.ahead_latency
    back_link, back_occupied, back_latency = tables.back_link, tables.back_occupied, tables.back_latency
    stages, ranks = len(rank_of), len(length)
    unknown = np.inf
    arrival_f = np.full((stages, microbatches), unknown)
    arrival_b = np.full((stages, microbatches), unknown)
    arrival_f[0, :] = 0.0
    arrival_b[stages - 1, :] = 0.0
    link_free = np.zeros(links + 1)
    free = np.zeros(ranks)
    position = np.zeros(ranks, np.int64)
    ready = np.ones(ranks, np.bool_)
    stack = np.empty(ranks, np.int64)
    for rank in range(ranks):
        stack[rank] = ranks - 1 - rank
    top, left = ranks, length.sum()
    while top > 0:
        top -= 1
        rank = stack[top]
        ready[rank] = False
        at, now = position[rank], free[rank]
        while at < length[rank]:
            parts = 2 if joined[rank, at] else 1
            begin = now
            for i in range(at, at + parts):
                k = kind[rank, i]
                if k == F:
                    begin = max(begin, arrival_f[stage[rank, i], microbatch[rank, i]])
                elif k != W:
                    begin = max(begin, arrival_b[stage[rank, i], microbatch[rank, i]])
            if begin == unknown:
                break
            for i in range(at, at + parts):
                start[rank, i] = begin
                begin = begin + duration[kind[rank, i], stage[rank, i]]
                end[rank, i] = begin
            now = begin
            for i in range(at, at + parts):
                k, s, b = kind[rank, i], stage[rank, i], microbatch[rank, i]
                if k == F:
                    target = s + 1
                    if target == stages:
                        continue
                    link = ahead_link[s]
                    if link >= 0:
                        begin = max(now, link_free[link]) + ahead_occupied[s]
                        link_free[link] = begin
                        arrival_f[target, b] = begin + ahead_latency[s]
                    else:
                        arrival_f[target, b] = now
                elif k != W and s > 0:
                    target = s - 1
                    link = back_link[s]
                    if link >= 0:
                        begin = max(now, link_free[link]) + back_occupied[s]
                        link_free[link] = begin
                        arrival_b[target, b] = begin + back_latency[s]
                    else:
                        arrival_b[target, b] = now
                else:
                    continue
                other = rank_of[target]
                if other != rank and not ready[other]:
                    ready[other] = True
                    stack[top] = other
                    top += 1
            at += parts
            left -= parts
        position[rank], free[rank] = at, now
    return left == 0


@kernel
def peak_of_rank(tables, kind, stage, count):
    """The largest sum of activation bytes of one rank's order (its rows as 1-d arrays), between its actions.

    An overlapped pair needs no care: its F comes first, and while both parts are under way both hold their bytes.
    """
    level, peak = np.int64(0), np.int64(0)
    for i in range(count):
        s, k = stage[i], kind[i]
        if k == F:
            level += tables.held[s]
        elif k == B:
            level -= tables.held[s]
        elif k == I:
            level += tables.kept[s] - tables.held[s]
        else:
            level -= tables.kept[s]
        peak = max(peak, level)
    return peak


@kernel
def objective_of(start, end, length, by_rank_time):
    """(the objective, the mean of the ranks' times) in seconds; the second breaks ties. Every rank has actions."""
    ranks = len(length)
    first, last, longest, total = np.inf, 0.0, 0.0, 0.0
    for rank in range(ranks):
        begin, finish = start[rank, 0], end[rank, length[rank] - 1]
        first, last = min(first, begin), max(last, finish)
        longest = max(longest, finish - begin)
        total += finish - begin
    if by_rank_time:
        return longest, total / ranks
    return last - first, total / ranks
