"""Memory limits: the search repeated over fixed limits, so that more memory never makes a result worse."""

from __future__ import annotations

import math

import numpy as np

from ppsim.order_search.at_limit import SAME, best_v_rounds, climb, paired, search_at
from ppsim.order_search.lower_bound import lower_bound_s
from ppsim.order_search.plan import Plan
from ppsim.order_search.problem import UNLIMITED_BYTES, Integers, Problem
from ppsim.schedule.named.registry import build_schedule, schedule_names, unmet_requirement
from ppsim.schedule.schedule import Schedule

# The fixed limits, in p whole microbatches per rank: eighths up to twice what 1F1B holds, where limits are usually set,
# then ever coarser.
_PIPELINES = [eighth / 8 for eighth in range(1, 17)] + [2.25, 2.5, 2.75, 3, 4, 6, 8, 12, 16, 24, 32]
# And in whole microbatches: where only a few fit, a part of one counts.
_WHOLES = [quarter / 4 for quarter in range(4, 16)] + [half / 2 for half in range(8, 17)]
_SMALL = 20_000  # in problems of up to this many actions a limit that could win by rounding alone is searched as well


def best_plan(problem: Problem) -> tuple[Plan, str]:
    """The best plan found that fits the problem's limit, and its name.

    Notes
    -----
    The candidates are the named schedules that fit, each of them improved by local moves, and one search at every fixed
    limit up to the problem's. A candidate depends on the problem and its own limit, not on the problem's limit. So a
    larger limit (one number for all ranks) has all candidates of a smaller one, and its best is no worse. A limit whose
    lower bound is above what was found already cannot win and is skipped; so are most. Limits that differ between
    ranks are searched as they are, too.
    """
    margin = 1 / SAME if problem.actions <= _SMALL else SAME
    best, best_s, name = None, math.inf, "search"
    named = named_plans(problem)
    for plan, plan_name, _ in named:
        found_s = plan.objective_s(problem)
        if found_s < best_s:
            best, best_s, name = plan, found_s, plan_name
    for limits, search in ((_limits(problem), search_at), (_finer_limits(problem), best_v_rounds)):
        for limit_bytes in limits:
            limited = problem.with_limit(limit_bytes)
            if best_s <= lower_bound_s(limited) * margin:
                continue
            plan, found_s = search(limited)
            if found_s < best_s:
                best, best_s, name = plan, found_s, "search"
    for plan, plan_name, own in named:
        goal_s = lower_bound_s(own)
        if best_s <= goal_s * margin:
            continue
        if plan.joined.any():
            found_s = plan.objective_s(own)
        else:
            plan, found_s = climb(own, plan, goal_s)
        plan, found_s = paired(own, plan, found_s)
        if found_s < best_s:
            best, best_s, name = plan, found_s, f"search from {plan_name}"
    if best is None:
        raise RuntimeError("no order came out of the search: please report")
    return best, name


def _limits(problem: Problem) -> list[Integers]:
    """The limits to search at, highest first, shape (p,) each: from one microbatch up to the problem's limit."""
    whole = int(problem.smallest_limit_bytes.max())  # one microbatch on all stages of the rank where it is largest
    larger = np.maximum(problem.tables.held_bytes, problem.tables.kept_bytes)
    everything = int(np.bincount(problem.placement, larger, problem.ranks).max()) * problem.microbatches
    given = problem.limit_bytes
    levels = {whole, everything, *(math.floor(count * problem.ranks * whole) for count in _PIPELINES)}
    levels |= {math.floor(count * whole) for count in _WHOLES if count <= 2 * problem.ranks}
    fitting = [level for level in levels if whole <= level <= everything and level <= given.min()]
    limits = [np.full(problem.ranks, level, np.int64) for level in sorted(fitting, reverse=True)]
    if (given != given[0]).any():
        limits.insert(0, np.minimum(given, UNLIMITED_BYTES))
    return limits


def _finer_limits(problem: Problem) -> list[Integers]:
    """Limits for what is quickly built: on a V whole activations of the largest stage, up to the problem's limit."""
    if not problem.is_v:
        return []
    whole, chunk = int(problem.smallest_limit_bytes.max()), int(problem.tables.held_bytes.max())
    most = min(int(problem.limit_bytes.min()), 2 * chunk * min(problem.microbatches, 3 * problem.ranks))
    levels = range(most // chunk * chunk, whole - 1, -chunk) if chunk else ()
    return [np.full(problem.ranks, level, np.int64) for level in levels]


def named_plans(problem: Problem) -> list[tuple[Plan, str, Problem]]:
    """The named schedules that fit: plan, name, and the problem under the limit that the plan itself needs."""
    found: list[tuple[Plan, str, Problem]] = []
    for name in schedule_names():
        schedule = _build(problem, name)
        if schedule is None or schedule.placement != problem.placement or schedule.copies > 1:
            continue
        plan = Plan.of(schedule, problem)
        peak = plan.peak_bytes(problem)
        if (peak <= problem.limit_bytes).all():
            even = np.full(problem.ranks, peak.max(), np.int64)
            own = even if (even <= problem.limit_bytes).all() else peak
            found.append((plan, name, problem.with_limit(own)))
    return found


def _build(problem: Problem, name: str) -> Schedule | None:
    """A named schedule; None if it does not exist for these numbers."""
    if unmet_requirement(name, problem.ranks, problem.microbatches, problem.stages_per_rank):
        return None
    return build_schedule(
        name, ranks=problem.ranks, microbatches=problem.microbatches, stages_per_rank=problem.stages_per_rank
    )
