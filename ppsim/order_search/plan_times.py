"""Plan times: when every action of a plan starts and ends, as a longest path, compiled.

The kernels of this package take a `problem.Tables` and a `plan.Plan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.problem import Floats, Tables
from ppsim.simulation.order_peak import order_peak

if TYPE_CHECKING:
    from ppsim.order_search.plan import Plan  # which imports this module


F, B, I, W = 0, 1, 2, 3  # noqa: E741  (the kinds as plain numbers, which compiled code compares)
# Weight of the ranks' mean time in a cost. Many orders have the same objective; of these the search prefers those whose
# ranks are done sooner. It is small, so that the objective decides wherever it differs by more than rounding.
_TIE = 1e-3


@kernel
def run_plan(tables: Tables, plan: Plan, start_s: Floats, end_s: Floats) -> bool:
    """Find when every action of a plan starts and ends; False if the plan deadlocks.

    Parameters
    ----------
    tables : Tables
        The problem.
    plan : Plan
        The orders. May hold overlapped pairs.
    start_s, end_s : (p, A)
        Filled in, in seconds from the step's start; exactly the floats that `ppsim.simulate` finds.

    Notes
    -----
    Every rank advances through its order until an input is missing. The rank that sends this input wakes it. Each
    action is visited about once, and no message table is built, as the simulator's engines would need.
    """
    stages, ranks = len(tables.rank), len(plan.length)
    arrival_s = first_arrivals(stages, tables.microbatches)
    link_free_s = np.zeros(tables.links)
    free_s = np.zeros(ranks)
    position = np.zeros(ranks, np.int64)
    # Ranks that can advance lie on a stack, rank 0 on top at first; each lies there once at most.
    stack = np.arange(ranks)[::-1].copy()
    on_stack = np.ones(ranks, np.bool_)
    top, left = ranks, int(plan.length.sum())
    while top > 0:
        top -= 1
        rank = stack[top]
        on_stack[rank] = False
        at, now = position[rank], free_s[rank]
        while at < plan.length[rank]:
            parts = 2 if plan.joined[rank, at] else 1  # an overlapped pair is one action of two entries
            begin = now
            for i in range(at, at + parts):
                k = plan.kind[rank, i]
                if k != W:
                    direction = 0 if k == F else 1
                    begin = max(begin, arrival_s[direction, plan.stage[rank, i], plan.microbatch[rank, i]])
            if begin == np.inf:
                break  # an input has not been sent yet
            share = _pair_share(tables, plan, rank, at) if parts == 2 else 1.0
            for i in range(at, at + parts):
                start_s[rank, i] = begin
                begin = begin + tables.duration_s[plan.kind[rank, i], plan.stage[rank, i]] * share
                end_s[rank, i] = begin
            now = begin
            for i in range(at, at + parts):
                k, s, b = plan.kind[rank, i], plan.stage[rank, i], plan.microbatch[rank, i]
                direction, target = receiver(k, s, stages)
                if target < 0:
                    continue
                arrival_s[direction, target, b] = arrival(tables, link_free_s, direction, s, now)
                other = tables.rank[target]
                if other != rank and not on_stack[other]:
                    on_stack[other] = True
                    stack[top] = other
                    top += 1
            at += parts
            left -= parts
        position[rank], free_s[rank] = at, now
    return left == 0


@kernel_part
def _pair_share(tables: Tables, plan: Plan, rank: int, at: int) -> float:
    """What the overlapped pair at this place takes, as a share of its parts: `timed_program.pair_share`."""
    both_s, communicated_s = 0.0, 0.0
    for i in range(at, at + 2):
        both_s += tables.duration_s[plan.kind[rank, i], plan.stage[rank, i]]
        communicated_s += tables.communication_s[plan.kind[rank, i], plan.stage[rank, i]]
    if communicated_s > 0:
        return float(max(both_s - communicated_s, communicated_s) / both_s)
    return 1.0


@kernel
def first_arrivals(stages: int, microbatches: int) -> Floats:
    """When inputs are there before anything has run, in seconds.

    Returns
    -------
    array of shape (2, S, m)
        Row 0 holds the inputs of F, row 1 those of B and I: the directions of messages. 0 for F of the first stage and
        backwards of the last, else inf.
    """
    arrival_s = np.full((2, stages, microbatches), np.inf)
    arrival_s[0, 0, :] = 0.0
    arrival_s[1, stages - 1, :] = 0.0
    return arrival_s


@kernel_part
def receiver(k: int, s: int, stages: int) -> tuple[int, int]:
    """Where the output of an action of kind k on stage s goes: (direction, stage); stage -1 for nowhere."""
    if k == F:
        return 0, (s + 1 if s + 1 < stages else -1)
    return 1, (-1 if k == W else s - 1)


@kernel_part
def arrival(tables: Tables, link_free_s: Floats, direction: int, s: int, sent_s: float) -> float:
    """When a message that stage s sends arrives; occupies its link until it has left."""
    link = tables.link[direction, s]
    if link < 0:
        return sent_s
    left_s = max(sent_s, link_free_s[link]) + tables.occupied_s[direction, s]
    link_free_s[link] = left_s
    return float(left_s + tables.latency_s[direction, s])


@kernel
def peak_of_rank(tables: Tables, kind: npt.NDArray[np.int8], stage: npt.NDArray[np.int32], length: int) -> int:
    """The most activation bytes that one rank holds at a time.

    Parameters
    ----------
    tables : Tables
        The problem.
    kind, stage : (A,)
        The rank's row of the plan.
    length : int
        How many entries of the row count.
    """
    return int(order_peak(kind, stage, 0, length, tables.held_bytes, tables.kept_bytes))


@kernel
def objective_of(begin_s: Floats, end_s: Floats, by_rank_time: bool) -> tuple[float, float]:
    """The objective of a step, and the cost that the search compares.

    Parameters
    ----------
    begin_s, end_s : (p,)
        Each rank's first start and last end.
    by_rank_time : bool
        Whether the objective is the longest rank's time, not the makespan.

    Returns
    -------
    objective_s, cost_s : float
        The cost adds a small share of the ranks' mean time to the objective.
    """
    times_s = end_s - begin_s
    objective_s = times_s.max() if by_rank_time else end_s.max() - begin_s.min()
    return objective_s, objective_s + _TIE * times_s.mean()
