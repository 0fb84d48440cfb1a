"""Greedy: an event-driven list scheduler with a policy; one run is one candidate order."""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel
from ppsim.search.plan_clock import B, F, I, W

# Columns of a policy, (p, COLUMNS): what a rank does when it is free, after the heuristic of the zero-bubble paper
# (Qi et al., 2024, section 4): backwards for the input and forwards in turn, weight backwards where nothing else can
# run or memory must be freed. A policy says what that means on each rank.
RULE = 0  # of an I and an F that can both run: BACKWARD_FIRST, ALTERNATE or FORWARD_FIRST
WAIT_FORWARD = 1  # no F if an I is known to come within this share of its duration
WAIT_WEIGHT = 2  # no W to fill a gap shorter than this share of its duration
DEFER = 3  # the most W that wait before one runs at once
DEEP_FORWARD, DEEP_BACKWARD = 4, 5  # with several stages: the highest that can run goes first (1) or the lowest (0)
SPLIT_HEAD, SPLIT_TAIL = 6, 7  # with FUSE_MIDDLE: how many microbatches are split at the start and at the end
COLUMNS = 8
BACKWARD_FIRST, ALTERNATE, FORWARD_FIRST = 0, 1, 2
# Full backwards: AT_ONCE where a W would have to follow at once, MIDDLE between the split head and tail.
FUSE_NEVER, FUSE_ALWAYS, FUSE_AT_ONCE, FUSE_MIDDLE = 0, 1, 2, 3


@kernel
def _settle(tree, size, times, rank):
    """The tree's leaf of a rank has changed: carry the earliest rank upwards."""
    node = (rank + size) >> 1
    while node >= 1:
        left, right = tree[2 * node], tree[2 * node + 1]
        tree[node] = left if times[left] <= times[right] else right
        node >>= 1


@kernel
def schedule_greedily(tables, microbatches, limit, policy, cap, fuse, kind, stage, microbatch, length, begin, free):
    """Write an order for every rank into kind, stage, microbatch (p, 3 v m) and length (p,); False if none came out.

    limit: (p,) bytes. policy: (p, COLUMNS). cap: (S,), the most microbatches of a stage between F and its backward.
    fuse: (S,), FUSE_*. begin, free: (p,), filled with each rank's first start and last end in seconds (an evaluation
    of the order may find them earlier: here a rank may wait in vain).

    Every stage takes its microbatches in sequence. A rank admits an F only if, its waiting W counted as released, the
    oldest microbatch that it has not finished would still fit whole: so the oldest can always move on and nothing
    waits for ever, and the limit is never exceeded.
    """
    rank_of, duration, held, kept = tables.rank, tables.duration, tables.held, tables.kept
    first, stages_of, links = tables.first, tables.stages, tables.links[0]
    ahead_link, ahead_occupied, ahead_latency = tables.ahead_link, tables.ahead_occupied, tables.ahead_latency
    back_link, back_occupied, back_latency = tables.back_link, tables.back_occupied, tables.back_latency
    stages, ranks = len(rank_of), len(limit)
    arrival_f = np.full((stages, microbatches), np.inf)
    arrival_b = np.full((stages, microbatches), np.inf)
    arrival_f[0, :] = 0.0
    arrival_b[stages - 1, :] = 0.0
    link_free = np.zeros(links + 1)
    forwards, backwards = np.zeros(stages, np.int64), np.zeros(stages, np.int64)
    # W that wait, per stage a queue of microbatches: split[s, head[s]:tail[s]]
    split = np.empty((stages, microbatches), np.int32)
    head, tail = np.zeros(stages, np.int64), np.zeros(stages, np.int64)
    waiting = np.zeros(ranks, np.int64)
    level, core = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)  # core: without what waiting W hold
    last_kind = np.full(ranks, -1, np.int64)
    free[:] = 0.0
    length[:] = 0
    size = 1
    while size < ranks:
        size *= 2
    times = np.full(size, np.inf)  # when each rank decides next
    tree = np.arange(-size, size)  # leaves are ranks, a node holds the earlier of its two
    times[rank_of[0]] = 0.0
    for node in range(size - 1, 0, -1):
        left, right = tree[2 * node], tree[2 * node + 1]
        tree[node] = left if times[left] <= times[right] else right
    to_do = 2 * stages * microbatches  # F and backwards; W are run out afterwards
    while True:
        rank = tree[1] if size > 1 else 0
        now = times[rank]
        if now == np.inf:
            break
        begin_stage, end_stage = first[rank], first[rank + 1]
        rule, defer = int(policy[rank, RULE]), policy[rank, DEFER]
        deep_forward, deep_backward = policy[rank, DEEP_FORWARD] > 0, policy[rank, DEEP_BACKWARD] > 0
        # 1. what could run: now, or at a time that is known already
        back, next_back, oldest = -1, np.inf, microbatches
        forward, next_forward, forward_blocked = -1, np.inf, False
        for i in range(begin_stage, end_stage):
            s = stages_of[i]
            oldest = min(oldest, backwards[s])
            if backwards[s] < forwards[s]:
                at = arrival_b[s, backwards[s]]
                if at > now:
                    next_back = min(next_back, at)
                elif back < 0 or deep_backward:
                    back = s
        need = np.int64(0)  # what the oldest unfinished microbatch has still to take
        for i in range(begin_stage, end_stage):
            s = stages_of[i]
            if forwards[s] <= oldest:
                need += held[s]
        for i in range(begin_stage, end_stage):
            s = stages_of[i]
            b = forwards[s]
            if b >= microbatches or b - backwards[s] >= cap[s]:
                continue
            at = arrival_f[s, b]
            if at == np.inf:
                continue
            reserved = need - held[s] if b <= oldest else need
            if core[rank] + held[s] + reserved > limit[rank]:
                continue
            if at > now:
                next_forward = min(next_forward, at)
                continue
            if forward < 0 or deep_forward:
                forward = s
        if forward >= 0:
            forward_blocked = level[rank] + held[forward] > limit[rank]
        # 2. which of it
        choice, s = -1, -1
        if waiting[rank] > defer:
            choice = W
        elif back >= 0 and (
            rule == BACKWARD_FIRST
            or forward < 0
            or (rule == ALTERNATE and last_kind[rank] != I and last_kind[rank] != B)
        ):
            choice, s = I, back
        elif forward >= 0:
            patience = policy[rank, WAIT_FORWARD] * duration[F, forward]
            if next_back - now >= patience or rule == FORWARD_FIRST:
                choice, s = (W, -1) if forward_blocked else (F, forward)
        if choice < 0 and waiting[rank] > 0:
            soonest = min(next_back, next_forward)
            w_stage = -1
            for i in range(begin_stage, end_stage):
                if tail[stages_of[i]] > head[stages_of[i]]:
                    w_stage = stages_of[i]
            if soonest - now >= policy[rank, WAIT_WEIGHT] * duration[W, w_stage]:
                choice = W
        if choice == I:
            grows = kept[s] - held[s]
            at_once = waiting[rank] >= defer and fuse[s] == FUSE_AT_ONCE
            b = backwards[s]
            middle = policy[rank, SPLIT_HEAD] <= b < microbatches - policy[rank, SPLIT_TAIL]
            if fuse[s] == FUSE_ALWAYS or at_once or (fuse[s] == FUSE_MIDDLE and middle):
                choice = B
            elif level[rank] + grows > limit[rank]:
                choice = W if waiting[rank] > 0 else B
        if choice < 0:
            times[rank] = min(next_back, next_forward)
            _settle(tree, size, times, rank)
            continue
        # 3. run it
        if choice == W:  # the oldest that waits
            s = -1
            for i in range(begin_stage, end_stage):
                other = stages_of[i]
                if head[other] < tail[other] and (s < 0 or split[other, head[other]] <= split[s, head[s]]):
                    s = other
            b = split[s, head[s]]
            head[s] += 1
            waiting[rank] -= 1
            level[rank] -= kept[s]
        elif choice == F:
            b = forwards[s]
            forwards[s] += 1
            level[rank] += held[s]
            core[rank] += held[s]
        else:
            b = backwards[s]
            backwards[s] += 1
            core[rank] -= held[s]
            level[rank] -= held[s]
            if choice == I:
                level[rank] += kept[s]
                split[s, tail[s]] = b
                tail[s] += 1
                waiting[rank] += 1
        if choice != W:
            last_kind[rank] = choice
            to_do -= 1
        at_end = now + duration[choice, s]
        if length[rank] == 0:
            begin[rank] = now
        kind[rank, length[rank]] = choice
        stage[rank, length[rank]] = s
        microbatch[rank, length[rank]] = b
        length[rank] += 1
        free[rank] = at_end
        times[rank] = at_end
        _settle(tree, size, times, rank)
        if choice == F and s + 1 < stages:
            at, link, target = at_end, ahead_link[s], s + 1
            if link >= 0:
                at = max(at_end, link_free[link]) + ahead_occupied[s]
                link_free[link] = at
                at += ahead_latency[s]
            arrival_f[target, b] = at
        elif choice != F and choice != W and s > 0:
            at, link, target = at_end, back_link[s], s - 1
            if link >= 0:
                at = max(at_end, link_free[link]) + back_occupied[s]
                link_free[link] = at
                at += back_latency[s]
            arrival_b[target, b] = at
        else:
            continue
        other = rank_of[target]
        wake = max(free[other], at)
        if other != rank and wake < times[other]:
            times[other] = wake
            _settle(tree, size, times, other)
    if to_do > 0:
        return False
    return waiting.sum() == 0
