"""Proof: how far a step that was found is from the best, by walking through partial steps."""

from __future__ import annotations

import time
from typing import NamedTuple

from ppsim.order_search.branch_and_bound import walk
from ppsim.order_search.lower_bound import without_overlap
from ppsim.order_search.plan import Plan
from ppsim.order_search.problem import Problem

SAME = 1 + 1e-9  # objectives this close are equal
# Effort is counted in microbatches of stages looked at, some ten million a second, so that time does not grow with the
# problem. Chosen: on two cores a search of the hardest problems of 4 to 8 ranks ends within ten seconds.
_EFFORT = 4_000_000
_MOST_STEPS = 50_000
_LEAST_STEPS = 2_000  # with fewer partial steps than this nothing would come of it
_ROUNDS, _MORE_ROUNDS, _MORE_FROM = 2, 3, 30_000  # chosen: how many goals are tried, more where so many steps fit


class Proof(NamedTuple):
    """What is known of the best order.

    Parameters
    ----------
    bound_s : float
        No order under the limit has a smaller objective.
    plan : Plan or None
        A better order, if one was found.
    """

    bound_s: float
    plan: Plan | None


def _steps_for(problem: Problem) -> int:
    """How many partial steps fit the effort; 0 where too few would."""
    steps = min(_MOST_STEPS, _EFFORT // (len(problem.placement) * problem.microbatches))
    return steps if steps >= _LEAST_STEPS else 0


def _raised_bound_s(problem: Problem, bound_s: float, found_s: float) -> float:
    """A larger bound than the one given, where a limited effort finds one.

    Parameters
    ----------
    problem : Problem
    bound_s : float
        No order has a smaller objective.
    found_s : float
        An order with this objective exists.

    Notes
    -----
    A goal is a bound if no order is better than it (a destructive bound: Klein and Scholl, Computing lower bounds by
    destructive improvement, European Journal of Operational Research 112, 1999). The smaller the goal, the fewer
    partial steps come below it. So the goal halves its way between what is proved and what was not.
    """
    most_steps = _steps_for(problem)
    if not most_steps:
        return bound_s
    for part in without_overlap(problem):
        for ranks in (*_few_ranks(problem), None):
            high_s = found_s
            for number in range(_MORE_ROUNDS if most_steps >= _MORE_FROM else _ROUNDS):
                if high_s <= bound_s * SAME:
                    break
                goal_s = high_s if number == 0 else (bound_s + high_s) / 2
                tried = walk(part, goal_s, most_steps=most_steps, only_ranks=ranks)
                bound_s = max(bound_s, tried.bound_s)
                if tried.is_complete and number == 0:
                    break
                if not tried.is_complete:
                    high_s = goal_s
    return bound_s


def _few_ranks(problem: Problem) -> list[list[int]]:
    """Ranks to look at alone: those at the ends and where a V turns, and one more."""
    ends = {0, problem.placement[-1], problem.ranks - 1}
    more = sorted({rank for rank in (problem.ranks // 2, problem.ranks - 2) if rank > 0})
    sets = [ends, *({*ends, rank} for rank in more)]
    return [sorted(ranks) for ranks in sets if len(ranks) < problem.ranks]


def proved(problem: Problem, bound_s: float, found_s: float, time_limit_s: float) -> Proof:
    """The best order and the proof that it is, or how much of both comes out in a time.

    Parameters
    ----------
    problem : Problem
    bound_s : float
        No order has a smaller objective.
    found_s : float
        An order with this objective exists.
    time_limit_s : float
        How many seconds all orders may take; 0 for a limited effort that is the same on all machines.
    """
    began_s, plan = time.monotonic(), None
    bound_s = _raised_bound_s(problem, bound_s, found_s)
    for part in without_overlap(problem):
        left_s = time_limit_s - (time.monotonic() - began_s)
        if found_s <= bound_s * SAME or left_s <= 0:
            break
        tried = walk(part, found_s, time_limit_s=left_s)
        bound_s = max(bound_s, tried.bound_s)
        if part is problem and tried.plan is not None:
            plan = tried.plan
    return Proof(bound_s, plan)
