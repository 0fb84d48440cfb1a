"""Tune: a local search over the greedy scheduler's policies, compiled. What it finds holds for any microbatch count."""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel
from ppsim.search.list_scheduler import (
    DEEP_BACKWARD,
    DEEP_FORWARD,
    DEFER,
    RULE,
    SPLIT_HEAD,
    SPLIT_TAIL,
    WAIT_FORWARD,
    WAIT_WEIGHT,
    schedule_greedily,
)

_TIE = 1e-3  # weight of the ranks' mean time, which leads over plateaus of the objective


@kernel
def cost_of(begin, free, by_rank_time):
    """The objective plus a little of the ranks' mean time, in seconds, from first starts and last ends (p,)."""
    mean = (free - begin).mean()
    if by_rank_time:
        return (free - begin).max() + _TIE * mean
    return free.max() - begin.min() + _TIE * mean


@kernel
def run_policies(tables, microbatches, limit, by_rank_time, policies, caps, fuses):
    """The cost of each of n policies (n, p, COLUMNS), caps and fuses (n, S), shape (n,); inf where none came out."""
    ranks = len(limit)
    room = 3 * microbatches * (tables.first[1:] - tables.first[:-1]).max()
    kind, length = np.empty((ranks, room), np.int8), np.zeros(ranks, np.int64)
    stage, microbatch = np.empty((ranks, room), np.int32), np.empty((ranks, room), np.int32)
    begin, free = np.zeros(ranks), np.zeros(ranks)
    costs = np.full(len(policies), np.inf)
    for n in range(len(policies)):
        if schedule_greedily(
            tables, microbatches, limit, policies[n], caps[n], fuses[n], kind, stage, microbatch, length, begin, free
        ):
            costs[n] = cost_of(begin, free, by_rank_time)
    return costs


@kernel
def tune(tables, microbatches, limit, by_rank_time, policy, cap, fuse, fusable, tries, goal, seed):
    """Change policy, cap and fuse in place for a smaller cost; returns it. `fusable`: whether a full B can pay.

    A move changes one thing on one rank or on a run of ranks; it stays unless the cost grows. Stops at `goal` seconds.
    """
    np.random.seed(seed)
    ranks, stages = len(limit), len(tables.rank)
    several = stages > ranks
    room = 3 * microbatches * (tables.first[1:] - tables.first[:-1]).max()
    kind, length = np.empty((ranks, room), np.int8), np.zeros(ranks, np.int64)
    stage, microbatch = np.empty((ranks, room), np.int32), np.empty((ranks, room), np.int32)
    begin, free = np.zeros(ranks), np.zeros(ranks)
    cost, objective = np.inf, np.inf
    fuse_kinds = 8 if several else 6  # the kinds of moves from there on concern full backwards
    kinds = fuse_kinds + (2 if fusable else 0)
    new_policy, new_cap, new_fuse = policy.copy(), cap.copy(), fuse.copy()
    for attempt in range(tries + 1):
        if objective <= goal:
            break
        if attempt > 0:
            new_policy[:], new_cap[:], new_fuse[:] = policy, cap, fuse
            what = np.random.randint(kinds)
            by_stage = what < 3 or (what % 2 == 0 and what >= fuse_kinds)
            one = np.random.randint(stages if by_stage else ranks)
            other = one + 1
            if np.random.random() < 0.4:
                other = min(one + 1 + np.random.randint(ranks), stages if by_stage else ranks)
            if what < 3:
                step = np.random.randint(4) - 2
                step += 1 if step >= 0 else 0
                for s in range(one, other):
                    most = microbatches
                    if tables.held[s] > 0:
                        most = max(1, min(most, limit[tables.rank[s]] // tables.held[s]))
                    new_cap[s] = max(1, min(most, new_cap[s] + step))
            elif what == 3:
                new_policy[one:other, WAIT_FORWARD] = np.random.randint(6) * 0.2
            elif what == 4:
                if np.random.random() < 0.6:
                    new_policy[one:other, WAIT_WEIGHT] = np.random.randint(6) * 0.2
                else:
                    choice = np.random.randint(6)
                    new_policy[one:other, DEFER] = microbatches if choice == 5 else choice
            elif what == 5:
                new_policy[one:other, RULE] = np.random.randint(3)
            elif what < fuse_kinds:
                column = DEEP_FORWARD if what == 6 else DEEP_BACKWARD
                new_policy[one:other, column] = 1.0 - new_policy[one, column]
            elif what % 2 == 0:
                new_fuse[one:other] = np.random.randint(4)
            else:
                column = SPLIT_HEAD if np.random.random() < 0.5 else SPLIT_TAIL
                step = np.random.randint(4) - 2
                step += 1 if step >= 0 else 0
                for rank in range(one, other):
                    new_policy[rank, column] = max(0.0, new_policy[rank, column] + step)
        if not schedule_greedily(
            tables, microbatches, limit, new_policy, new_cap, new_fuse, kind, stage, microbatch, length, begin, free
        ):
            continue
        new = cost_of(begin, free, by_rank_time)
        if new <= cost:
            cost = new
            objective = (free - begin).max() if by_rank_time else free.max() - begin.min()
            policy[:], cap[:], fuse[:] = new_policy, new_cap, new_fuse
    return cost
