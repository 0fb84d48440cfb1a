"""Improve: a local search over orders, compiled. It moves actions that are on the critical path."""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel
from ppsim.search.plan_clock import B, F, I, W, objective_of, peak_of_rank, run_plan

_REACH = 4  # the farthest that one move goes
_TIE = 1e-3  # weight of the ranks' mean time, which leads over plateaus of the objective


@kernel
def _critical_path(tables, kind, stage, microbatch, start, end, length, where, by_rank_time, path):
    """The longest path, from its end: rank, position, and 1 if the step waited for its rank, into path (3, steps).

    Begins at the last end that makes the objective. Returns the number of steps.
    """
    count, worst, value = 0, 0, -1.0
    for r in range(len(length)):
        time = end[r, length[r] - 1] - (start[r, 0] if by_rank_time else 0.0)
        if time > value:
            worst, value = r, time
    r, i = worst, length[worst] - 1
    while True:
        path[0, count], path[1, count] = r, i
        after_own = i > 0 and start[r, i] <= end[r, i - 1]
        path[2, count] = 1 if after_own else 0
        count += 1
        s, b, k = stage[r, i], microbatch[r, i], kind[r, i]
        if after_own:
            i -= 1
        elif k == F and s > 0:
            r, i = tables.rank[s - 1], where[0, s - 1, b]
        elif (k in (B, I)) and s + 1 < len(tables.rank):
            r, i = tables.rank[s + 1], where[1, s + 1, b]
        else:
            return count


@kernel
def _may_pass(kind, stage, microbatch, r, early, late):
    """Whether `late` may come before `early` on rank r: not of one microbatch and stage, nor of one kind and stage."""
    if stage[r, early] != stage[r, late]:
        return True
    if microbatch[r, early] == microbatch[r, late]:
        return False
    both_back = (kind[r, early] == B or kind[r, early] == I) and (kind[r, late] == B or kind[r, late] == I)
    return kind[r, early] != kind[r, late] and not both_back


@kernel
def _rotate(kind, stage, microbatch, where, r, source, target):
    """Move the entry at `source` to `target` on rank r, those between by one; note where F and backwards are."""
    k, s, b = kind[r, source], stage[r, source], microbatch[r, source]
    step = 1 if target > source else -1
    for i in range(source, target, step):
        kind[r, i], stage[r, i], microbatch[r, i] = kind[r, i + step], stage[r, i + step], microbatch[r, i + step]
        if kind[r, i] != W:
            where[0 if kind[r, i] == F else 1, stage[r, i], microbatch[r, i]] = i
    kind[r, target], stage[r, target], microbatch[r, target] = k, s, b
    if k != W:
        where[0 if k == F else 1, s, b] = target


@kernel
def _fuse_or_split(kind, stage, microbatch, where, length, r, at, distance):
    """Turn the I at `at` and its W into one B there, or a B into I and a W up to `distance` later; False if neither."""
    k, s, b = kind[r, at], stage[r, at], microbatch[r, at]
    if k == I:
        other = at + 1
        while kind[r, other] != W or stage[r, other] != s or microbatch[r, other] != b:
            other += 1
        _rotate(kind, stage, microbatch, where, r, other, length[r] - 1)
        length[r] -= 1
        kind[r, at] = B
        return True
    if k == B:
        kind[r, at] = I
        last = length[r]
        kind[r, last], stage[r, last], microbatch[r, last] = W, s, b
        length[r] += 1
        _rotate(kind, stage, microbatch, where, r, last, min(last, at + distance))
        return True
    return False


@kernel
def _shift(kind, stage, microbatch, length, r, at, distance, earlier):
    """Where a step of the critical path goes: (from, to). It moves before, or the one before it moves past it."""
    if earlier:
        target = at
        while target > 0 and at - target < distance and _may_pass(kind, stage, microbatch, r, target - 1, at):
            target -= 1
        return at, target
    source, target = at - 1, at - 1
    while (
        target + 1 < length[r]
        and target + 1 - at < distance
        and _may_pass(kind, stage, microbatch, r, source, target + 1)
    ):
        target += 1
    return source, target


@kernel
def improve(
    tables, microbatches, limit, by_rank_time, fusable, kind, stage, microbatch, length, tries, heat, goal, seed
):
    """Change the orders in place for a smaller objective; returns it, in seconds.

    fusable: whether a full B can pay. tries: moves tried. heat: seconds by which a move may be worse at first; falls
    to 0. goal: stop at this objective. No pairs. The orders must fit `limit` and can end; so do those returned.
    """
    np.random.seed(seed)
    ranks, room = kind.shape
    joined = np.zeros((ranks, room), np.bool_)
    start, end = np.zeros((ranks, room)), np.zeros((ranks, room))
    where = np.zeros((2, len(tables.rank), microbatches), np.int64)
    for r in range(ranks):
        for i in range(length[r]):
            if kind[r, i] != W:
                where[0 if kind[r, i] == F else 1, stage[r, i], microbatch[r, i]] = i
    run_plan(tables, microbatches, kind, stage, microbatch, joined, length, start, end)
    best, mean = objective_of(start, end, length, by_rank_time)
    best_cost = best + _TIE * mean
    cost = best_cost
    kept_kind, kept_stage, kept_microbatch, kept_length = kind.copy(), stage.copy(), microbatch.copy(), length.copy()
    row_kind, row_stage, row_microbatch = kind[0].copy(), stage[0].copy(), microbatch[0].copy()
    path = np.empty((3, ranks * room), np.int64)
    steps = _critical_path(tables, kind, stage, microbatch, start, end, length, where, by_rank_time, path)
    for attempt in range(tries):
        if best <= goal:
            break
        pick = np.random.randint(steps)
        r, at = path[0, pick], path[1, pick]
        distance = 1 + np.random.randint(_REACH)
        old_length = length[r]
        source, target = 0, 0
        fusing = fusable and np.random.random() < 0.3
        if fusing:
            row_kind[:], row_stage[:], row_microbatch[:] = kind[r], stage[r], microbatch[r]
            if not _fuse_or_split(kind, stage, microbatch, where, length, r, at, distance):
                continue
        elif path[2, pick] == 0:
            continue
        else:
            source, target = _shift(kind, stage, microbatch, length, r, at, distance, np.random.random() < 0.5)
            if source == target:
                continue
            _rotate(kind, stage, microbatch, where, r, source, target)
        fits = peak_of_rank(tables, kind[r], stage[r], length[r]) <= limit[r]
        if fits and run_plan(tables, microbatches, kind, stage, microbatch, joined, length, start, end):
            value, mean = objective_of(start, end, length, by_rank_time)
            new = value + _TIE * mean
            if new <= cost + heat * (1.0 - attempt / tries):
                cost = new
                steps = _critical_path(tables, kind, stage, microbatch, start, end, length, where, by_rank_time, path)
                if value < best or (value == best and cost < best_cost):
                    best, best_cost = value, cost
                    kept_kind[:], kept_stage[:], kept_microbatch[:] = kind, stage, microbatch
                    kept_length[:] = length
                continue
        if fusing:
            length[r] = old_length
            kind[r], stage[r], microbatch[r] = row_kind, row_stage, row_microbatch
            for i in range(old_length):
                if kind[r, i] != W:
                    where[0 if kind[r, i] == F else 1, stage[r, i], microbatch[r, i]] = i
        else:
            _rotate(kind, stage, microbatch, where, r, target, source)
    kind[:], stage[:], microbatch[:], length[:] = kept_kind, kept_stage, kept_microbatch, kept_length
    return best
