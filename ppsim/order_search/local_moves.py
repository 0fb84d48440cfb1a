"""Local moves: a local search over orders that moves actions on the critical path, compiled."""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.plan import Plan
from ppsim.order_search.plan_times import B, F, I, W, objective_of, peak_of_rank, run_plan
from ppsim.order_search.problem import Floats, Integers, Tables

_REACH = 4  # chosen: the farthest that one move goes, in places of the order
_FUSING = 0.3  # chosen: where full backwards pay: how often a move joins I and W, or parts a B


@kernel
def improve(tables: Tables, plan: Plan, tries: int, heat_s: float, goal_s: float, seed: int) -> float:
    """Change a plan in place for a smaller objective; returns it, in seconds.

    Parameters
    ----------
    tables : Tables
        The problem.
    plan : Plan
        Fits the limit, does not deadlock and holds no overlapped pairs; the same holds of the result.
    tries : int
        How many moves to try.
    heat_s : float
        By how much a move may make the cost worse at first; this falls to 0 in a straight line.
    goal_s : float
        Stop at this objective.
    seed : int
        Of the random moves.

    Notes
    -----
    Only moves on the critical path can shorten the step, so they alone are tried. Accepting worse moves within a
    falling bound is threshold accepting (Dueck and Scheuer, Journal of Computational Physics 90, 1990). Each trial
    runs the plan as a whole.
    """
    np.random.seed(seed)
    ranks, room = plan.kind.shape
    start_s, end_s = np.zeros((ranks, room)), np.zeros((ranks, room))
    where = np.zeros((2, len(tables.rank), tables.microbatches), np.int64)
    for r in range(ranks):
        _note_places(plan, where, r)
    run_plan(tables, plan, start_s, end_s)
    best_s, best_cost_s = _objective(tables, plan, start_s, end_s)
    cost_s = best_cost_s
    best_kind, best_stage, best_microbatch = plan.kind.copy(), plan.stage.copy(), plan.microbatch.copy()
    best_length = plan.length.copy()
    row_kind, row_stage, row_microbatch = plan.kind[0].copy(), plan.stage[0].copy(), plan.microbatch[0].copy()
    path = np.empty((3, ranks * room), np.int64)
    steps = _critical_path(tables, plan, where, start_s, end_s, path)
    for attempt in range(tries):
        if best_s <= goal_s:
            break
        # 1. Draw a step of the critical path and change its rank's order there.
        pick = np.random.randint(steps)
        r, at, waits_for_rank = path[0, pick], path[1, pick], path[2, pick]
        distance = 1 + np.random.randint(_REACH)
        old_length = plan.length[r]
        source, target = 0, 0
        is_fusing = tables.full_backward_pays and np.random.random() < _FUSING
        if is_fusing:
            row_kind[:], row_stage[:], row_microbatch[:] = plan.kind[r], plan.stage[r], plan.microbatch[r]
            if not _fuse_or_split(plan, where, r, at, distance):
                continue
        elif not waits_for_rank:
            continue  # it waits for a message: no order of its own rank makes it earlier
        else:
            source, target = _shift(plan, r, at, distance, np.random.random() < 0.5)
            if source == target:
                continue
            _rotate(plan, where, r, source, target)
        # 2. Keep the change if it fits, can run, and is good enough for this moment.
        fits = peak_of_rank(tables, plan.kind[r], plan.stage[r], plan.length[r]) <= tables.limit_bytes[r]
        if fits and run_plan(tables, plan, start_s, end_s):
            objective_s, new_cost_s = _objective(tables, plan, start_s, end_s)
            if new_cost_s <= cost_s + heat_s * (1.0 - attempt / tries):
                cost_s = new_cost_s
                steps = _critical_path(tables, plan, where, start_s, end_s, path)
                if objective_s < best_s or (objective_s == best_s and cost_s < best_cost_s):
                    best_s, best_cost_s = objective_s, cost_s
                    best_kind[:], best_stage[:], best_microbatch[:] = plan.kind, plan.stage, plan.microbatch
                    best_length[:] = plan.length
                continue
        # 3. Else take it back.
        if is_fusing:
            plan.length[r] = old_length
            plan.kind[r], plan.stage[r], plan.microbatch[r] = row_kind, row_stage, row_microbatch
            _note_places(plan, where, r)
        else:
            _rotate(plan, where, r, target, source)
    plan.kind[:], plan.stage[:], plan.microbatch[:] = best_kind, best_stage, best_microbatch
    plan.length[:] = best_length
    return best_s


@kernel
def _objective(tables: Tables, plan: Plan, start_s: Floats, end_s: Floats) -> tuple[float, float]:
    """The objective and the cost of a plan that has been run."""
    last_end_s = np.empty(len(plan.length))
    for r in range(len(plan.length)):
        last_end_s[r] = end_s[r, plan.length[r] - 1]
    return objective_of(start_s[:, 0], last_end_s, tables.by_rank_time)


@kernel_part
def _note_places(plan: Plan, where: Integers, r: int) -> None:
    """Note in `where` (2, S, m) at which place of rank r's order each F (row 0) and each B or I (row 1) stands."""
    for i in range(plan.length[r]):
        if plan.kind[r, i] != W:
            where[0 if plan.kind[r, i] == F else 1, plan.stage[r, i], plan.microbatch[r, i]] = i


@kernel_part
def _critical_path(tables: Tables, plan: Plan, where: Integers, start_s: Floats, end_s: Floats, path: Integers) -> int:
    """Walk the critical path back from the end that makes the objective; returns its number of steps.

    Writes each step into `path` (3, steps): rank, place in its order, and 1 if it started when its rank was free, 0 if
    it waited for a message.
    """
    count, worst, longest_s = 0, 0, -1.0
    for r in range(len(plan.length)):
        time_s = end_s[r, plan.length[r] - 1] - (start_s[r, 0] if tables.by_rank_time else 0.0)
        if time_s > longest_s:
            worst, longest_s = r, time_s
    r, i = worst, plan.length[worst] - 1
    while True:
        waits_for_rank = i > 0 and start_s[r, i] <= end_s[r, i - 1]
        path[0, count], path[1, count], path[2, count] = r, i, 1 if waits_for_rank else 0
        count += 1
        s, b, k = plan.stage[r, i], plan.microbatch[r, i], plan.kind[r, i]
        if waits_for_rank:
            i -= 1
        elif k == F and s > 0:
            r, i = tables.rank[s - 1], where[0, s - 1, b]
        elif k in (B, I) and s + 1 < len(tables.rank):
            r, i = tables.rank[s + 1], where[1, s + 1, b]
        else:
            return count


@kernel_part
def _shift(plan: Plan, r: int, at: int, distance: int, earlier: bool) -> tuple[int, int]:
    """Where a move goes, (from, to): the action at `at` comes earlier, or the one before it goes past it."""
    if earlier:
        target = at
        while target > 0 and at - target < distance and _may_swap(plan, r, target - 1, at):
            target -= 1
        return at, target
    source, target = at - 1, at - 1
    while target + 1 < plan.length[r] and target + 1 - at < distance and _may_swap(plan, r, source, target + 1):
        target += 1
    return source, target


@kernel_part
def _may_swap(plan: Plan, r: int, early: int, late: int) -> bool:
    """Whether the action at `late` may come before the one at `early`.

    On one stage neither may the actions of one microbatch change places, nor those of one kind (B and I are one here):
    every stage takes its microbatches in sequence.
    """
    if plan.stage[r, early] != plan.stage[r, late]:
        return True
    if plan.microbatch[r, early] == plan.microbatch[r, late]:
        return False
    k, other = plan.kind[r, early], plan.kind[r, late]
    return k != other and not (k in (B, I) and other in (B, I))


@kernel_part
def _rotate(plan: Plan, where: Integers, r: int, source: int, target: int) -> None:
    """Move the action at `source` to `target` and those between by one place."""
    k, s, b = plan.kind[r, source], plan.stage[r, source], plan.microbatch[r, source]
    step = 1 if target > source else -1
    for i in range(source, target, step):
        _put(plan, where, r, i, plan.kind[r, i + step], plan.stage[r, i + step], plan.microbatch[r, i + step])
    _put(plan, where, r, target, k, s, b)


@kernel_part
def _put(plan: Plan, where: Integers, r: int, i: int, k: int, s: int, b: int) -> None:
    """Write an action at place i of rank r's order, and note the place."""
    plan.kind[r, i], plan.stage[r, i], plan.microbatch[r, i] = k, s, b
    if k != W:
        where[0 if k == F else 1, s, b] = i


@kernel_part
def _fuse_or_split(plan: Plan, where: Integers, r: int, at: int, distance: int) -> bool:
    """Join the I at `at` and its W to a B, or part a B into I and a W up to `distance` later; False if neither."""
    k, s, b = plan.kind[r, at], plan.stage[r, at], plan.microbatch[r, at]
    if k == I:
        other = at + 1
        while plan.kind[r, other] != W or plan.stage[r, other] != s or plan.microbatch[r, other] != b:
            other += 1
        _rotate(plan, where, r, other, plan.length[r] - 1)
        plan.length[r] -= 1
        plan.kind[r, at] = B
        return True
    if k == B:
        plan.kind[r, at] = I
        last = plan.length[r]
        plan.kind[r, last], plan.stage[r, last], plan.microbatch[r, last] = W, s, b
        plan.length[r] += 1
        _rotate(plan, where, r, last, min(last, at + distance))
        return True
    return False


@kernel
def join_pairs(tables: Tables, plan: Plan, tries: int, seed: int) -> float:
    """Join neighbours F and B of a plan to overlapped pairs, in place, for a smaller objective; returns it, in seconds.

    Parameters
    ----------
    tables : Tables
        The problem.
    plan : Plan
        Fits the limit and does not deadlock; so does the result.
    tries : int
        How many places to try: all in sequence if that many are, and further ones at random, where a joint may also
        be undone. With fewer tries than places all are at random, so that no rank is left out.
    seed : int
        Of the random choices.

    Notes
    -----
    A change stays unless the cost grows. A B before an F may become a pair as well, if the F's bytes fit beside it.
    """
    np.random.seed(seed)
    ranks, room = plan.kind.shape
    start_s, end_s = np.zeros((ranks, room)), np.zeros((ranks, room))
    run_plan(tables, plan, start_s, end_s)
    best_s, cost_s = _objective(tables, plan, start_s, end_s)
    all_places = plan.length.sum()
    swept = all_places if tries >= all_places else 0
    r, i = 0, -1
    for attempt in range(tries):
        if attempt < swept:
            i += 1
            if i == plan.length[r]:
                r, i = r + 1, 0
        else:
            r = np.random.randint(ranks)
            i = np.random.randint(plan.length[r])
        is_swapped = False
        if not plan.joined[r, i]:
            if i + 1 >= plan.length[r] or plan.joined[r, i + 1] or (i > 0 and plan.joined[r, i - 1]):
                continue
            is_swapped = plan.kind[r, i] == B and plan.kind[r, i + 1] == F
            if not is_swapped and not (plan.kind[r, i] == F and plan.kind[r, i + 1] == B):
                continue
            if plan.stage[r, i] == plan.stage[r, i + 1] and plan.microbatch[r, i] == plan.microbatch[r, i + 1]:
                continue  # this B needs this F
            if is_swapped:
                _swap(plan, r, i)
        plan.joined[r, i] = not plan.joined[r, i]
        fits = (
            not is_swapped or peak_of_rank(tables, plan.kind[r], plan.stage[r], plan.length[r]) <= tables.limit_bytes[r]
        )
        if fits and run_plan(tables, plan, start_s, end_s):
            objective_s, new_cost_s = _objective(tables, plan, start_s, end_s)
            if new_cost_s <= cost_s:
                best_s, cost_s = objective_s, new_cost_s
                continue
        plan.joined[r, i] = not plan.joined[r, i]
        if is_swapped:
            _swap(plan, r, i)
    return best_s


@kernel_part
def _swap(plan: Plan, r: int, i: int) -> None:
    """Exchange the actions at places i and i + 1 of rank r's order."""
    k, s, b = plan.kind[r, i], plan.stage[r, i], plan.microbatch[r, i]
    plan.kind[r, i], plan.stage[r, i], plan.microbatch[r, i] = (
        plan.kind[r, i + 1],
        plan.stage[r, i + 1],
        plan.microbatch[r, i + 1],
    )
    plan.kind[r, i + 1], plan.stage[r, i + 1], plan.microbatch[r, i + 1] = k, s, b
