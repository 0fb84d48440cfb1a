"""All orders of tiny problems: the best of every order that fits, by trying each."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

import ppsim
from ppsim.order_search.plan import Plan
from ppsim.order_search.plan_times import objective_of, peak_of_rank, run_plan
from ppsim.order_search.problem import Problem

# p, m, v, placement, limit in microbatches of a rank, and the least makespan with F = I = W = 1 a stage and weights'
# share of the activations 1/2: found by an exhaustive solver that is not part of this project.
OPTIMA = [
    (3, 6, 1, "loop", 1.5, 37),
    (4, 4, 1, "loop", 2, 21),
    (4, 6, 1, "loop", 2, 31),
    (4, 6, 1, "loop", 3, 24),
    (2, 4, 2, "loop", 1, 33),
    (2, 6, 2, "loop", 1, 49),
    (2, 6, 2, "loop", 1.5, 38),
    (3, 4, 2, "loop", 1.5, 35),
    (2, 6, 2, "v", 1, 49),
    (3, 4, 2, "v", 1.5, 35),
    (3, 5, 2, "loop", 2, 36),
]


@functools.cache
def orders_of(stages: tuple[int, ...], microbatches: int) -> list[list[str]]:
    """Every order of a rank whose stages take their microbatches in sequence; each backward split or full."""
    found: list[list[str]] = []

    def extend(order: list[str], counts: dict[tuple[int, str], int], waiting: frozenset[tuple[int, int]]) -> None:
        if not waiting and all(counts[stage, "back"] == microbatches for stage in stages):
            found.append(order)
            return
        for stage in stages:
            b = counts[stage, "F"]
            if b < microbatches:
                extend([*order, f"{stage}F{b}"], counts | {(stage, "F"): b + 1}, waiting)
            b = counts[stage, "back"]
            if b < counts[stage, "F"]:
                after = counts | {(stage, "back"): b + 1}
                extend([*order, f"{stage}I{b}"], after, waiting | {(stage, b)})
                extend([*order, f"{stage}B{b}"], after, waiting)
        for stage in stages:
            queue = sorted(b for s, b in waiting if s == stage)
            if queue:
                extend([*order, f"{stage}W{queue[0]}"], counts, waiting - {(stage, queue[0])})

    extend([], {(stage, what): 0 for stage in stages for what in ("F", "back")}, frozenset())
    return found


def optimum_s(problem: Problem) -> dict[str, float]:
    """The smallest objective of each kind over all orders that fit, with each stage's microbatches in sequence."""
    per_rank = []
    for rank in range(problem.ranks):
        spelled = orders_of(tuple(problem.stages_of(rank)), problem.microbatches)
        orders = [ppsim.Order.of(names) for names in spelled]
        peaks = [peak_of_rank(problem.tables, each.kind, each.stage, len(each)) for each in orders]
        fits = [peak <= problem.limit_bytes[rank] for peak in peaks]
        per_rank.append(list(itertools.compress(orders, fits)))
    plan = Plan.empty(problem)
    start, end = np.zeros(plan.kind.shape), np.zeros(plan.kind.shape)
    best = {"makespan": math.inf, "rank_time": math.inf}
    for chosen in itertools.product(*per_rank):
        for rank, order in enumerate(chosen):
            plan.length[rank] = len(order)
            plan.kind[rank, : len(order)] = order.kind
            plan.stage[rank, : len(order)] = order.stage
            plan.microbatch[rank, : len(order)] = order.microbatch
        if run_plan(problem.tables, plan, start, end):
            last_end = end[np.arange(problem.ranks), plan.length - 1]
            for objective in best:
                found_s, _ = objective_of(start[:, 0], last_end, objective == "rank_time")
                best[objective] = min(best[objective], found_s)
    return best
