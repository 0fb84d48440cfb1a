"""Policy tuning: a local search over the list scheduler's policies, compiled.

A policy says nothing about single microbatches. So it can be tuned with few of them and used with many.
"""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.list_scheduler import schedule_greedily
from ppsim.order_search.plan import Plan
from ppsim.order_search.plan_times import objective_of
from ppsim.order_search.policies import (
    DEEP_BACKWARD,
    DEEP_FORWARD,
    DEFER,
    RULE,
    SPLIT_HEAD,
    SPLIT_TAIL,
    WAIT_FORWARD,
    WAIT_WEIGHT,
    Policy,
)
from ppsim.order_search.problem import Floats, Tables

_SEVERAL = 0.4  # chosen: how often a move changes a run of ranks or stages, not one


@kernel
def run_policies(tables: Tables, plan: Plan, policies: Policy) -> Floats:
    """The cost in seconds of each of n policies, shape (n,); inf where one leads to no complete step.

    Parameters
    ----------
    tables : Tables
    plan : Plan
        Room to work in.
    policies : Policy
        With a leading axis of n.
    """
    begin_s, free_s = np.zeros(len(plan.length)), np.zeros(len(plan.length))
    costs_s = np.full(len(policies.rules), np.inf)
    for n in range(len(costs_s)):
        policy = Policy(policies.rules[n], policies.cap[n], policies.fuse[n])
        if schedule_greedily(tables, policy, plan, begin_s, free_s):
            _, costs_s[n] = objective_of(begin_s, free_s, tables.by_rank_time)
    return costs_s


@kernel
def tune(tables: Tables, plan: Plan, policy: Policy, tries: int, goal_s: float, seed: int) -> None:
    """Change a policy in place by random moves; a move stays unless the cost grows.

    Parameters
    ----------
    tables : Tables
    plan : Plan
        Room to work in.
    policy : Policy
        Changed in place.
    tries : int
        How many moves to try.
    goal_s : float
        Stop at this objective, in seconds.
    seed : int
        Of the random moves.
    """
    np.random.seed(seed)
    begin_s, free_s = np.zeros(len(plan.length)), np.zeros(len(plan.length))
    changed = Policy(policy.rules.copy(), policy.cap.copy(), policy.fuse.copy())
    least_cost_s, least_s = np.inf, np.inf
    for attempt in range(tries + 1):
        if least_s <= goal_s:
            break
        if attempt > 0:  # the first attempt is the policy as it came
            changed.rules[:], changed.cap[:], changed.fuse[:] = policy.rules, policy.cap, policy.fuse
            _move(tables, changed)
        if not schedule_greedily(tables, changed, plan, begin_s, free_s):
            continue
        objective_s, cost_s = objective_of(begin_s, free_s, tables.by_rank_time)
        if cost_s <= least_cost_s:
            least_cost_s, least_s = cost_s, objective_s
            policy.rules[:], policy.cap[:], policy.fuse[:] = changed.rules, changed.cap, changed.fuse


@kernel_part
def _move(tables: Tables, policy: Policy) -> None:
    """Change one thing of a policy at random, on one rank or stage or on a run of them.

    The moves: three shares of the draws go to the caps, one each to when an F waits, when a W waits, and which action
    goes first; with several stages per rank one each to which of them goes first; where full backwards pay one each to
    where they are run and to the split head and tail.
    """
    ranks, stages = len(tables.limit_bytes), len(tables.rank)
    fuse_moves = 8 if stages > ranks else 6  # the number of the first move that concerns full backwards
    move = np.random.randint(fuse_moves + (2 if tables.full_backward_pays else 0))
    is_by_stage = move < 3 or move == fuse_moves
    count = stages if is_by_stage else ranks
    begin = np.random.randint(count)
    end = begin + 1
    if np.random.random() < _SEVERAL:
        end = min(begin + 1 + np.random.randint(ranks), count)
    if move < 3:
        step = _small_step()
        for s in range(begin, end):
            most = tables.microbatches
            if tables.held_bytes[s] > 0:
                most = max(1, min(most, tables.limit_bytes[tables.rank[s]] // tables.held_bytes[s]))
            policy.cap[s] = max(1, min(most, policy.cap[s] + step))
    elif move == 3:
        policy.rules[begin:end, WAIT_FORWARD] = np.random.randint(6) * 0.2
    elif move == 4:
        if np.random.random() < 0.6:
            policy.rules[begin:end, WAIT_WEIGHT] = np.random.randint(6) * 0.2
        else:
            most_waiting = np.random.randint(6)
            policy.rules[begin:end, DEFER] = tables.microbatches if most_waiting == 5 else most_waiting
    elif move == 5:
        policy.rules[begin:end, RULE] = np.random.randint(3)
    elif move < fuse_moves:
        column = DEEP_FORWARD if move == 6 else DEEP_BACKWARD
        policy.rules[begin:end, column] = 1.0 - policy.rules[begin, column]
    elif move == fuse_moves:
        policy.fuse[begin:end] = np.random.randint(4)
    else:
        column = SPLIT_HEAD if np.random.random() < 0.5 else SPLIT_TAIL
        step = _small_step()
        for rank in range(begin, end):
            policy.rules[rank, column] = max(0.0, policy.rules[rank, column] + step)


@kernel_part
def _small_step() -> int:
    """-2, -1, 1 or 2."""
    step = np.random.randint(4) - 2
    return step + 1 if step >= 0 else step
