"""Climb: the search under one limit: portfolio, tuning, then moves on the critical path."""

from __future__ import annotations

import numpy as np

from ppsim.search.list_scheduler import schedule_greedily
from ppsim.search.local_moves import improve
from ppsim.search.lower_bound import lower_bound_s
from ppsim.search.plan import Plan
from ppsim.search.policies import Policies, is_fusable, portfolio
from ppsim.search.policy_tuning import run_policies, tune
from ppsim.search.problem import Problem

# Effort, in actions scheduled, so that time does not grow with the problem (about 15 M actions a second).
_SMALL = 500  # up to this many actions, the wide portfolio (if no full B can pay, which multiplies it), all heats
_WHOLE = 8_000  # up to this many actions, policies are judged at the full microbatch count
_TUNE, _TUNE_LEAST, _TUNE_MOST = 2_000_000, 60, 1_500
_MOVE, _MOVE_LEAST, _MOVE_MOST = 8_000_000, 150, 6_000  # too few moves are not worth their start
_HEATS = (0.05, 0.3, 1.0)  # in mean durations: how much worse a move may be at first; the first, if not small
_STARTS = 2  # policies that are tuned
_SEED = 20240
_SAME = 1 + 1e-12


def search_at(problem: Problem) -> tuple[Plan, float]:
    """The best plan found under exactly this limit, and its objective in seconds. Depends on the problem alone.

    A policy's schedule settles into a period, so with many microbatches policies are judged on fewer (three times the
    ranks); the best are then run with all.
    """
    goal = lower_bound_s(problem) * _SAME
    model = _shortened(problem)
    chosen = _judge(model, portfolio(model, wide=actions_of(model) <= _SMALL and not is_fusable(model)))
    best, best_s = _run(problem, chosen)
    if best_s <= goal or best_s == np.inf:
        return best, best_s
    tuned = _tuned(model, chosen)
    plan, found_s = _run(problem, tuned)
    if found_s < best_s:
        best, best_s = plan, found_s
    return (best, best_s) if best_s <= goal else climb(problem, best, goal)


def climb(problem: Problem, plan: Plan, goal_s: float) -> tuple[Plan, float]:
    """The plan improved by moves on its critical path until `goal_s`, and its objective in seconds.

    The plan holds no pairs and fits the problem's limit; so does the result.
    """
    actions = actions_of(problem)
    tries = min(_MOVE_MOST, _MOVE // actions)
    best, best_s = plan, plan.objective_s(problem)
    if tries < _MOVE_LEAST:
        return best, best_s
    mean_s = float(problem.tables.duration.mean())
    for seed, heat in enumerate(_HEATS if actions <= _SMALL else _HEATS[:1]):
        if best_s <= goal_s * _SAME:
            break
        better = plan.copy()
        found_s = improve(
            problem.tables,
            problem.microbatches,
            problem.limit_bytes,
            problem.by_rank_time,
            is_fusable(problem),
            better.kind,
            better.stage,
            better.microbatch,
            better.length,
            tries,
            heat * mean_s,
            goal_s * _SAME,
            _SEED + seed,
        )
        if found_s < best_s:
            best, best_s = better, float(found_s)
    return best, best_s


def actions_of(problem: Problem) -> int:
    """F, I and W of everything: what the effort is counted in."""
    return 3 * len(problem.placement) * problem.microbatches


def _shortened(problem: Problem) -> Problem:
    if actions_of(problem) <= _WHOLE:
        return problem
    fewer = max(3 * problem.ranks, _WHOLE // (3 * len(problem.placement)))
    return problem.with_microbatches(min(problem.microbatches, fewer))


def _judge(model: Problem, policies: Policies) -> Policies:
    """The best few that differ, best first."""
    costs = run_policies(
        model.tables,
        model.microbatches,
        model.limit_bytes,
        model.by_rank_time,
        policies.policy,
        policies.cap,
        policies.fuse,
    )
    picked: list[int] = []
    for index in np.argsort(costs, kind="stable").tolist():
        if not picked or costs[index] > costs[picked[-1]] * (1 + 1e-9):
            picked.append(index)
        if len(picked) == _STARTS:
            break
    return policies.take(picked)


def _tuned(model: Problem, policies: Policies) -> Policies:
    goal = lower_bound_s(model) * _SAME
    tries = min(_TUNE_MOST, max(_TUNE_LEAST, _TUNE // actions_of(model))) // len(policies)
    better = policies.take(range(len(policies)))
    for number in range(len(better)):
        tune(
            model.tables,
            model.microbatches,
            model.limit_bytes,
            model.by_rank_time,
            better.policy[number],
            better.cap[number],
            better.fuse[number],
            is_fusable(model),
            tries,
            goal,
            _SEED + number,
        )
    return better


def _run(problem: Problem, policies: Policies) -> tuple[Plan, float]:
    """The best plan of these policies, and its objective in seconds."""
    best, best_s = Plan.empty(problem), np.inf
    begin, free = np.zeros(problem.ranks), np.zeros(problem.ranks)
    for policy, cap, fuse in zip(policies.policy, policies.cap, policies.fuse, strict=True):
        plan = Plan.empty(problem)
        written = (plan.kind, plan.stage, plan.microbatch, plan.length, begin, free)
        if schedule_greedily(problem.tables, problem.microbatches, problem.limit_bytes, policy, cap, fuse, *written):
            found_s = plan.objective_s(problem)
            if found_s < best_s:
                best, best_s = plan, found_s
    return best, float(best_s)
