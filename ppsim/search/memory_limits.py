"""Ladder: the search over limits, so that more memory never makes a result worse."""

from __future__ import annotations

import math

import numpy as np

from ppsim.schedule.named.registry import build_schedule, schedule_names
from ppsim.schedule.schedule import Schedule
from ppsim.search.at_limit import actions_of, climb, search_at
from ppsim.search.lower_bound import lower_bound_s
from ppsim.search.plan import Plan
from ppsim.search.problem import UNLIMITED_BYTES, Integers, Problem

# Steps of the ladder in shares of p whole microbatches per rank. Fine where limits are usually set.
_SHARES = [eighth / 8 for eighth in range(1, 17)] + [2.25, 2.5, 2.75, 3, 4, 6, 8, 12, 16, 24, 32]
# And in whole microbatches: where only a few fit, each part of one counts.
_WHOLES = [quarter / 4 for quarter in range(4, 16)] + [half / 2 for half in range(8, 17)]
_SAME = 1 + 1e-12  # objectives this close are equal: sums of the same numbers in another order
_TO_THE_BIT = 20_000  # up to this many actions, steps that could win by that much are searched as well


def best_plan(problem: Problem) -> tuple[Plan, str]:
    """The best plan found that fits the problem's limit, and its name.

    Candidates are the named schedules that fit, the same improved, and one search at every step of the ladder that is
    no higher than the limit. Each of them depends on the problem and on its step only, not on the limit. So a larger
    limit (one number for all ranks) has all candidates of a smaller one, and its best is no worse. A step whose lower
    bound is above what was found already cannot win and is left out; so most are. Limits that differ between ranks
    are searched as they are, too.
    """
    margin = 1 / _SAME if actions_of(problem) <= _TO_THE_BIT else _SAME
    best, best_s, name = None, math.inf, "search"
    named = _named(problem)
    for plan, plan_name, _ in named:
        found_s = plan.objective_s(problem)
        if found_s < best_s:
            best, best_s, name = plan, found_s, plan_name
    for limit in _steps(problem):
        step = problem.with_limit(limit)
        if best_s <= lower_bound_s(step) * margin:
            continue
        plan, found_s = search_at(step)
        if found_s < best_s:
            best, best_s, name = plan, found_s, "search"
    for plan, plan_name, own in named:
        goal_s = lower_bound_s(own)
        if plan.joined.any() or best_s <= goal_s * margin:
            continue
        plan, found_s = climb(own, plan, goal_s)
        if found_s < best_s:
            best, best_s, name = plan, found_s, f"search from {plan_name}"
    if best is None:
        raise RuntimeError("no order came out of the search: please report")
    return best, name


def _steps(problem: Problem) -> list[Integers]:
    """The limits to search at, highest first, shape (p,) each; all fit one microbatch and the problem's limit."""
    least = problem.smallest_limit_bytes
    whole = int(least.max())
    larger = np.maximum(problem.tables.held, problem.tables.kept)
    everything = int(np.bincount(problem.placement, larger, problem.ranks).max()) * problem.microbatches
    given = problem.limit_bytes
    levels = {whole, everything, *(math.floor(share * problem.ranks * whole) for share in _SHARES)}
    levels |= {math.floor(count * whole) for count in _WHOLES if count <= 2 * problem.ranks}
    fitting = [level for level in levels if whole <= level <= everything and level <= given.min()]
    steps = [np.full(problem.ranks, level, np.int64) for level in sorted(fitting, reverse=True)]
    if (given != given[0]).any():
        steps.insert(0, np.minimum(given, UNLIMITED_BYTES))
    return steps


def _named(problem: Problem) -> list[tuple[Plan, str, Problem]]:
    """The named schedules that fit: plan, name, and the problem under the limit that the plan itself needs."""
    found: list[tuple[Plan, str, Problem]] = []
    for name in schedule_names():
        schedule = _build(problem, name)
        if schedule is None or schedule.placement != problem.placement:
            continue
        plan = Plan.of(schedule, problem)
        peak = plan.peak_bytes(problem)
        if (peak <= problem.limit_bytes).all():
            even = np.full(problem.ranks, peak.max(), np.int64)
            own = even if (even <= problem.limit_bytes).all() else peak
            found.append((plan, name, problem.with_limit(own)))
    return found


def _build(problem: Problem, name: str) -> Schedule | None:
    try:
        return build_schedule(
            name, ranks=problem.ranks, microbatches=problem.microbatches, stages_per_rank=problem.stages_per_rank
        )
    except ValueError:  # not for these numbers
        return None
