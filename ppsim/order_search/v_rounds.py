"""V rounds: builds orders for two stages per rank on a V, a backward and a forward of each rank a round; compiled."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.plan import Plan
from ppsim.order_search.plan_times import F, I, W
from ppsim.order_search.problem import Floats, Integers, Problem, Tables

_MOST_REPAIRS = 20  # chosen: how often the orders are built again with the waits of the last time


class _State(NamedTuple):
    """A schedule under construction: S stages, p ranks, m microbatches. All arrays change in place."""

    hop_s: Floats  # (2, S): from the end of an F (row 0) or an I (row 1) to its arrival
    end_s: Floats  # (2, S, m): when each F and I ends
    done: Integers  # (2, S): how many F and I have been run
    queue: Integers  # (p, 2m): stages whose W waits, oldest first: queue[r, queue_head[r]:queue_tail[r]]
    queue_head: Integers  # (p,)
    queue_tail: Integers  # (p,)
    weights: Integers  # (S,): how many W have been run
    level_bytes: Integers  # (p,): activation bytes held
    free_s: Floats  # (p,)
    wait_s: Floats  # (p,): what each rank has waited since its first F


def v_round_plans(problem: Problem) -> list[Plan]:
    """Orders for the problem by rounds on a V; those that come to an end within the limit.

    Notes
    -----
    After the heuristic of Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 6 and appendix: the warm-up
    runs forwards ahead as long as they fit before the first microbatch comes back up, then forwards on both ways in
    turn. From there every rank runs one backward and one forward a round, that of the way up where it can. W go where
    they fit into a wait, where memory is needed, and where a rank would otherwise wait longer than any rank has so far:
    a rank's wait counts only if it is the longest. With the waits known, the orders are built again: what one rank must
    wait anyway, another may.
    """
    plans: list[Plan] = []
    for fills_forward, fills_backward in itertools.product((True, False), repeat=2):
        for reserves in (False, True):  # rounds without a reserve may get stuck under a tight limit
            found = _repaired(problem, fills_forward, fills_backward, reserves)
            plans += found
            if found:
                break
    return plans


def _repaired(problem: Problem, fills_forward: bool, fills_backward: bool, reserves: bool) -> list[Plan]:
    """Orders by rounds, built again with the waits of the time before as long as the longest wait falls."""
    plans: list[Plan] = []
    allowed_s, longest_s = np.zeros(problem.ranks), np.inf
    for _ in range(_MOST_REPAIRS):
        plan, wait_s = Plan.empty(problem), np.zeros(problem.ranks)
        if not build_rounds(problem.tables, plan, fills_forward, fills_backward, reserves, allowed_s, wait_s):
            break
        plans.append(plan)
        if wait_s.max() >= longest_s:
            break
        longest_s = float(wait_s.max())
        allowed_s = longest_s - wait_s
    return plans


@kernel
def build_rounds(
    tables: Tables,
    plan: Plan,
    fills_forward: bool,
    fills_backward: bool,
    reserves: bool,
    allowed_s: Floats,
    wait_s: Floats,
) -> bool:
    """Write an order for every rank; False where the rounds come to no end.

    Parameters
    ----------
    tables : Tables
        The problem, of two stages per rank on a V.
    plan : Plan
        Filled in.
    fills_forward, fills_backward : bool
        Whether a W may come before an F, or before an I on the way down, where the wait is shorter than the W.
    reserves : bool
        Whether the last place is kept for a microbatch that has come down to a rank and has still to come up.
    allowed_s : (p,)
        What each rank may wait whatever the others do; 0 where that is not known.
    wait_s : (p,)
        Filled in with what each rank waits.
    """
    ranks, m = len(tables.limit_bytes), tables.microbatches
    stages = 2 * ranks
    state = _State(
        tables.occupied_s + tables.latency_s,
        np.zeros((2, stages, m)),
        np.zeros((2, stages), np.int64),
        np.empty((ranks, 2 * m), np.int64),
        np.zeros(ranks, np.int64),
        np.zeros(ranks, np.int64),
        np.zeros(stages, np.int64),
        np.zeros(ranks, np.int64),
        np.zeros(ranks),
        wait_s,
    )
    plan.length[:] = 0
    plan.joined[:] = False
    wait_s[:] = 0.0
    if not _warm_up(tables, plan, state):
        return False
    chosen = np.empty(ranks, np.int64)
    left = 2 * stages * m - state.done.sum()
    while left > 0:
        before = left
        # 1. One backward a rank: those of the lower stages from the turn of the V on, then those of the upper stages
        # from rank 0 on, so that each knows when its input comes.
        for r in range(ranks):
            chosen[r] = _next_backward(state, r, ranks, m)
        for step in range(2 * ranks):
            r = ranks - 1 - step if step < ranks else step - ranks
            s = chosen[r]
            if (step < ranks) != (s < ranks) or not _is_ready(state, I, s, m):
                continue
            while state.level_bytes[r] + tables.kept_bytes[s] - tables.held_bytes[s] > tables.limit_bytes[r]:
                if not _put_weight(tables, plan, state, r):
                    return False
            _fill(tables, plan, state, r, I, s, allowed_s, s < ranks or fills_backward)
            _put(tables, plan, state, r, I, s)
            left -= 1
        # 2. One forward a rank.
        for r in range(ranks):
            s = _next_forward(state, r, ranks, m)
            if s < 0 or not _is_ready(state, F, s, m) or not _make_room(tables, plan, state, r, s, reserves):
                continue
            _fill(tables, plan, state, r, F, s, allowed_s, fills_forward)
            _put(tables, plan, state, r, F, s)
            left -= 1
        if left == before:
            return False
    # 3. The W that are left.
    for r in range(ranks):
        while _put_weight(tables, plan, state, r):
            pass
    return True


@kernel_part
def _warm_up(tables: Tables, plan: Plan, state: _State) -> bool:
    """Forwards before the first backward; False where microbatch 0 does not come to its end."""
    ranks, m = len(tables.limit_bytes), tables.microbatches
    for r in range(ranks):
        if not _put_forward(tables, plan, state, r, r):
            return False
    # 1. While microbatch 0 comes back up, more go down, if afterwards every rank on the way still has room for it.
    for r in range(ranks - 1, -1, -1):
        up = 2 * ranks - 1 - r
        while r < ranks - 1 and state.done[0, r] < m:
            there_s = state.end_s[0, up - 1, 0] + state.hop_s[0, up - 1]
            needed = state.level_bytes[r] + (1 + 2 * r) * tables.held_bytes[r] + tables.held_bytes[up]
            if needed > tables.limit_bytes[r] or state.free_s[r] + tables.duration_s[F, r] > there_s:
                break
            fits = True
            for other in range(r + 1):
                last = 2 * ranks - 1 - other
                held = tables.held_bytes[other] + tables.held_bytes[last]
                fits = fits and state.level_bytes[other] + held <= tables.limit_bytes[other]
            if not fits:
                break
            for other in range(r + 1):
                _put(tables, plan, state, other, F, other)
        if not _put_forward(tables, plan, state, r, up):
            return False
    # 2. Forwards on both ways in turn, until every rank has run as many as the one before it.
    goes_up, idle = False, 0
    for r in range(1, ranks):
        while idle < 2 and (
            state.done[0, r] + state.done[0, 2 * ranks - 1 - r] < state.done[0, r - 1] + state.done[0, 2 * ranks - r]
            or state.done[0, 2 * ranks - 1 - r] <= state.done[0, 2 * ranks - r] < m
        ):
            idle += 1
            for other in range(ranks - 1, r - 1, -1):
                if _put_forward(tables, plan, state, other, 2 * ranks - 1 - other if goes_up else other):
                    idle = 0
            goes_up = not goes_up
        idle = 0
    return True


@kernel_part
def _put_forward(tables: Tables, plan: Plan, state: _State, r: int, s: int) -> bool:
    """Run the next F of a stage if its input is known and it fits; whether it did."""
    fits = state.level_bytes[r] + tables.held_bytes[s] <= tables.limit_bytes[r]
    if not fits or not _is_ready(state, F, s, tables.microbatches):
        return False
    _put(tables, plan, state, r, F, s)
    return True


@kernel_part
def _is_ready(state: _State, k: int, s: int, m: int) -> bool:
    """Whether the next F or I of a stage exists and all that it needs has been run."""
    b = state.done[0 if k == F else 1, s]
    if b >= m:
        return False
    if k == F:
        return bool(s == 0 or state.done[0, s - 1] > b)
    return bool(state.done[0, s] > b and (s + 1 == len(state.weights) or state.done[1, s + 1] > b))


@kernel_part
def _next_backward(state: _State, r: int, ranks: int, m: int) -> int:
    """The stage of a rank's next backward: the lower one where its input is known."""
    up = 2 * ranks - 1 - r
    if state.done[1, r] >= state.done[1, up]:
        return up
    if r == ranks - 1 or state.done[1, r + 1] > state.done[1, r] or state.done[1, up] >= m:
        return r
    return up


@kernel_part
def _next_forward(state: _State, r: int, ranks: int, m: int) -> int:
    """The stage of a rank's next forward: the upper one where its input is known; -1 for none."""
    up = 2 * ranks - 1 - r
    if state.done[0, up] >= m:
        return -1
    if state.done[0, up] >= state.done[0, r]:
        return r
    if r == ranks - 1 or state.done[0, up - 1] > state.done[0, up]:
        return up
    return r if state.done[0, r] < m else -1


@kernel_part
def _make_room(tables: Tables, plan: Plan, state: _State, r: int, s: int, reserves: bool) -> bool:
    """Run W until an F fits; False where it does not."""
    up = 2 * len(tables.limit_bytes) - 1 - r
    needed = tables.held_bytes[s]
    if reserves and s == r and state.done[0, r] > state.done[1, up] and state.done[0, up] <= state.done[1, up]:
        needed += tables.held_bytes[up]
    while state.level_bytes[r] + needed > tables.limit_bytes[r]:
        if not _put_weight(tables, plan, state, r):
            return False
    return True


@kernel_part
def _fill(tables: Tables, plan: Plan, state: _State, r: int, k: int, s: int, allowed_s: Floats, fills: bool) -> None:
    """Put W where a rank would wait for the input of its next F or I."""
    source = s - 1 if k == F else s + 1
    row = 0 if k == F else 1
    if source < 0 or source >= len(tables.rank) or tables.rank[source] == r:
        return
    there_s = state.end_s[row, source, state.done[row, s]] + state.hop_s[row, source]
    while state.queue_head[r] < state.queue_tail[r]:
        weight_s = tables.duration_s[W, state.queue[r, state.queue_head[r]]]
        if there_s < state.free_s[r] + weight_s:
            # Too short for the W. But a rank may not wait longer than any other rank does anyway.
            longest_s = allowed_s[r]
            for other in range(len(state.wait_s)):
                longest_s = max(longest_s, state.wait_s[other])
            if fills and there_s - state.free_s[r] > longest_s - state.wait_s[r]:
                _put_weight(tables, plan, state, r)
            return
        _put_weight(tables, plan, state, r)


@kernel_part
def _put(tables: Tables, plan: Plan, state: _State, r: int, k: int, s: int) -> None:
    """Run the next F or I of a stage."""
    row, source = (0, s - 1) if k == F else (1, s + 1)
    b = state.done[row, s]
    start_s = state.free_s[r]
    if 0 <= source < len(tables.rank):
        start_s = max(start_s, state.end_s[row, source, b] + state.hop_s[row, source])
    if k == I:
        start_s = max(start_s, state.end_s[0, s, b])
    if state.done[0, r] > 0:
        state.wait_s[r] += start_s - state.free_s[r]
    state.free_s[r] = state.end_s[row, s, b] = start_s + tables.duration_s[k, s]
    state.done[row, s] += 1
    if k == F:
        state.level_bytes[r] += tables.held_bytes[s]
    else:
        state.level_bytes[r] += tables.kept_bytes[s] - tables.held_bytes[s]
        state.queue[r, state.queue_tail[r]] = s
        state.queue_tail[r] += 1
    _write(plan, r, k, s, b)


@kernel_part
def _put_weight(tables: Tables, plan: Plan, state: _State, r: int) -> bool:
    """Run the oldest W that waits; False where none does."""
    if state.queue_head[r] == state.queue_tail[r]:
        return False
    s = state.queue[r, state.queue_head[r]]
    state.queue_head[r] += 1
    state.free_s[r] += tables.duration_s[W, s]
    state.level_bytes[r] -= tables.kept_bytes[s]
    _write(plan, r, W, s, state.weights[s])
    state.weights[s] += 1
    return True


@kernel_part
def _write(plan: Plan, r: int, k: int, s: int, b: int) -> None:
    """Add an action to a rank's order."""
    at = plan.length[r]
    plan.kind[r, at], plan.stage[r, at], plan.microbatch[r, at] = k, s, b
    plan.length[r] += 1
