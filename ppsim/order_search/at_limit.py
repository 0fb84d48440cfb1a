"""Search at a limit: portfolio of policies, tuning, local moves on the critical path, a beam, and moves once more."""

from __future__ import annotations

import numpy as np

from ppsim.order_search.branch_and_bound import walk
from ppsim.order_search.list_scheduler import schedule_greedily
from ppsim.order_search.local_moves import improve, join_pairs
from ppsim.order_search.lower_bound import lower_bound_s
from ppsim.order_search.plan import Plan
from ppsim.order_search.policies import Policy, one_by_one, portfolio, take
from ppsim.order_search.policy_tuning import run_policies, tune
from ppsim.order_search.problem import Problem
from ppsim.order_search.v_rounds import v_round_plans

# Effort is counted in actions scheduled, about 15 million a second, so that time does not grow with the problem. The
# amounts are chosen by the time they take, under one limit: 0.15 s for tuning, half a second for moves.
_SMALL = 500  # problems of up to this many actions get the wide portfolio and every heat
_WHOLE = 8_000  # up to this many actions policies are judged with all microbatches
_TUNING_ACTIONS, _LEAST_TUNING_TRIES, _MOST_TUNING_TRIES = 2_000_000, 60, 1_500
_MOVING_ACTIONS, _LEAST_MOVES, _MOST_MOVES = 8_000_000, 150, 6_000  # with fewer moves than the least none are tried
_HEATS = (0.05, 0.3, 1.0)  # by how much a move may be worse at first, in mean durations of an action
_BEAM_STEPS, _BEAM_EFFORT, _LEAST_WIDTH = 60_000, 10_000_000, 8  # chosen: a beam takes about half a second
_WIDER, _CLOSE = 4, 1.005  # a beam that comes this close to the best so far is repeated so many times wider
_RESTARTS, _RESTARTED = 16, 2_000  # chosen: moves from the best, up to this many actions; a second where they all run
_RESTART_HEATS = (0.3, 1.0)  # chosen: in turn; lower ones end where they began
_STARTS = 2  # how many policies are tuned
_SEED = 20240  # any number; fixed, so that the same problem gives the same result
SAME = 1 + 1e-12  # objectives this close are equal: sums of the same numbers in another order


def search_at(problem: Problem) -> tuple[Plan, float]:
    """Search under exactly the problem's limit.

    Returns
    -------
    plan : Plan
        The best plan found. It depends on the problem alone.
    objective_s : float
        Its objective in seconds.

    Notes
    -----
    A policy's schedule settles into a period. So with many microbatches policies are judged and tuned on fewer of them
    (three times the ranks), and only the best are run with all.

    Under a tight limit every policy of the portfolio may get stuck where a rank has several stages. They are then tried
    again with one microbatch per stage at a time, with which no policy gets stuck: see
    `ppsim.order_search.list_scheduler.schedule_greedily`.
    """
    goal_s = lower_bound_s(problem) * SAME
    model = _shortened(problem)
    # Where full backwards pay the portfolio is seven times as large already.
    wide = model.actions <= _SMALL and not model.tables.full_backward_pays
    policies = portfolio(model, wide=wide)
    chosen = _best_policies(model, policies)
    best, best_s = _run(problem, chosen)
    if best_s == np.inf:
        chosen = _best_policies(model, policies._replace(cap=np.ones_like(policies.cap)))
        best, best_s = _run(problem, chosen)
    if problem.is_v and best_s > goal_s:
        best, best_s = _better(best, best_s, *best_v_rounds(problem))
    if best_s <= goal_s:
        return best, best_s
    best, best_s = _better(best, best_s, *_run(problem, _tuned(model, chosen)))
    if best_s > goal_s:
        best, best_s = climb(problem, best, goal_s)
    if best_s > goal_s:
        best, best_s = _better(best, best_s, *_by_beam(problem, best_s))
    if best_s > goal_s:
        best, best_s = _restarted(problem, best, best_s, goal_s)
    return paired(problem, best, best_s)


def _restarted(problem: Problem, plan: Plan, plan_s: float, goal_s: float) -> tuple[Plan, float]:
    """The plan after short runs of moves, each from the best so far; many of these find more than a long one."""
    best, best_s = plan, plan_s
    mean_s = float(problem.tables.duration_s.mean())
    for number in range(_RESTARTS if problem.actions <= _RESTARTED else 0):
        if best_s <= goal_s:
            break
        other = best.copy()
        heat_s = _RESTART_HEATS[number % len(_RESTART_HEATS)] * mean_s
        other_s = float(improve(problem.tables, other, _moves(problem), heat_s, goal_s, _SEED + number))
        if other_s <= best_s:  # an equal one too: the next run starts from another order
            best, best_s = other, other_s
    return best, best_s


def _by_beam(problem: Problem, best_s: float) -> tuple[Plan, float]:
    """An order better than the best so far by a beam through the graph of partial steps; inf where none comes out.

    Policies decide rank by rank and moves change a few places; below p microbatches of memory the best orders are
    often unlike both.
    """
    width = min(_BEAM_STEPS, _BEAM_EFFORT // (len(problem.placement) * problem.microbatches)) // problem.actions
    found, found_s = Plan.empty(problem), np.inf
    if width < _LEAST_WIDTH:
        return found, found_s
    for each in (width, _WIDER * width):
        plan = walk(problem, min(best_s * _CLOSE, found_s), width=each).plan
        if plan is None:
            break
        found, found_s = plan, plan.objective_s(problem)
    return found, found_s


def paired(problem: Problem, plan: Plan, plan_s: float) -> tuple[Plan, float]:
    """The plan with overlapped pairs where they pay, and its objective in seconds; the plan itself where none does.

    Where stages do not communicate a pair only binds: both parts wait for both inputs.
    """
    if not problem.tables.communication_s.any():
        return plan, plan_s
    tries = _moves(problem)
    best, best_s = plan, plan_s
    if not tries:
        return best, best_s
    for joined in (plan.copy(), plan.with_full_backwards()):  # only an F and a B make a pair
        best, best_s = _better(best, best_s, joined, float(join_pairs(problem.tables, joined, tries, _SEED)))
    return best, best_s


def best_v_rounds(problem: Problem) -> tuple[Plan, float]:
    """The best of `ppsim.order_search.v_rounds` and its objective in seconds; inf where none comes to an end."""
    best, best_s = Plan.empty(problem), np.inf
    for plan in v_round_plans(problem):
        best, best_s = _better(best, best_s, plan, plan.objective_s(problem))
    return best, float(best_s)


def _better(one: Plan, one_s: float, other: Plan, other_s: float) -> tuple[Plan, float]:
    """The plan with the smaller objective; the first of two equal ones."""
    return (other, other_s) if other_s < one_s else (one, one_s)


def climb(problem: Problem, plan: Plan, goal_s: float) -> tuple[Plan, float]:
    """Improve a plan by local moves.

    Parameters
    ----------
    problem : Problem
    plan : Plan
        Fits the limit and holds no overlapped pairs; so does the result.
    goal_s : float
        Stop at this objective.

    Returns
    -------
    plan : Plan
        The best plan found, which may be the one given.
    objective_s : float
        Its objective in seconds.
    """
    tries = _moves(problem)
    best, best_s = plan, plan.objective_s(problem)
    if not tries:
        return best, best_s
    mean_s = float(problem.tables.duration_s.mean())
    for number, heat in enumerate(_HEATS if problem.actions <= _SMALL else _HEATS[:1]):
        if best_s <= goal_s * SAME:
            break
        better = plan.copy()
        found_s = improve(problem.tables, better, tries, heat * mean_s, goal_s * SAME, _SEED + number)
        if found_s < best_s:
            best, best_s = better, float(found_s)
    return best, best_s


def _moves(problem: Problem) -> int:
    """How many moves of one kind are tried; 0 where too few of them would fit the effort."""
    tries = min(_MOST_MOVES, _MOVING_ACTIONS // problem.actions)
    return tries if tries >= _LEAST_MOVES else 0


def _shortened(problem: Problem) -> Problem:
    """The problem with as many microbatches as policies are judged on."""
    if problem.actions <= _WHOLE:
        return problem
    fewer = max(3 * problem.ranks, _WHOLE // (3 * len(problem.placement)))
    return problem.with_microbatches(min(problem.microbatches, fewer))


def _best_policies(model: Problem, policies: Policy) -> Policy:
    """The few policies of the least costs, best first; of those with equal costs one."""
    costs_s = run_policies(model.tables, Plan.empty(model), policies)
    picked: list[int] = []
    for index in np.argsort(costs_s, kind="stable").tolist():
        if not picked or costs_s[index] > costs_s[picked[-1]] * (1 + 1e-9):
            picked.append(index)
        if len(picked) == _STARTS:
            break
    return take(policies, picked)


def _tuned(model: Problem, policies: Policy) -> Policy:
    """The policies after tuning; the tries are dealt out evenly."""
    goal_s = lower_bound_s(model) * SAME
    count = len(policies.rules)
    tries = min(_MOST_TUNING_TRIES, max(_LEAST_TUNING_TRIES, _TUNING_ACTIONS // model.actions)) // count
    better, room = take(policies, range(count)), Plan.empty(model)
    for number, policy in enumerate(one_by_one(better)):
        tune(model.tables, room, policy, tries, goal_s, _SEED + number)
    return better


def _run(problem: Problem, policies: Policy) -> tuple[Plan, float]:
    """The best plan of these policies, and its objective in seconds; inf if all of them get stuck."""
    best, best_s = Plan.empty(problem), np.inf
    begin_s, free_s = np.zeros(problem.ranks), np.zeros(problem.ranks)
    for policy in one_by_one(policies):
        plan = Plan.empty(problem)
        if schedule_greedily(problem.tables, policy, plan, begin_s, free_s):
            best, best_s = _better(best, best_s, plan, plan.objective_s(problem))
    return best, float(best_s)
