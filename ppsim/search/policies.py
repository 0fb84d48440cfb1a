"""Portfolio: the policies that the greedy scheduler starts from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppsim.schedule.action import Kind
from ppsim.search import list_scheduler
from ppsim.search.lower_bound import Chains
from ppsim.search.problem import Floats, Integers, Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Policies:
    """n policies: policy (n, p, COLUMNS), cap (n, S), fuse (n, S), as `list_scheduler.schedule_greedily` takes them."""

    policy: Floats
    cap: Integers
    fuse: Integers

    def __len__(self) -> int:
        return len(self.policy)

    def take(self, index: Sequence[int]) -> Policies:
        """Those of the given numbers."""
        chosen = list(index)
        return Policies(policy=self.policy[chosen], cap=self.cap[chosen], fuse=self.fuse[chosen])


def is_fusable(problem: Problem) -> bool:
    """Whether a full backward is anywhere shorter than I and W."""
    duration = problem.tables.duration
    return bool((duration[Kind.B] < duration[Kind.I] + duration[Kind.W]).any())


def _caps(problem: Problem, shares: Sequence[float]) -> list[Integers]:
    """How many microbatches a stage may have between F and backward, shape (S,) each.

    A stage whose microbatches come back after R seconds (`bound`) needs R / d of them to start one every d seconds.
    d = F keeps a rank busy with forwards until the first returns (ZB-H2's warm-up); d = the longest rank's work per
    microbatch suffices for its pace in the steady state; between them lies 1F1B's p - r. The last cap is none.
    """
    tables, chain = problem.tables, Chains(problem)
    forward = tables.duration[Kind.F]
    pace = np.bincount(tables.rank, forward + chain.work, problem.ranks).max()
    room = np.full(len(forward), problem.microbatches, np.int64)
    sized = tables.held > 0
    room[sized] = np.minimum(room[sized], problem.limit_bytes[tables.rank[sized]] // tables.held[sized])
    caps = []
    for share in shares:
        step = forward + share * (pace - forward)
        count = np.divide(chain.round_trip, step, out=np.zeros(len(forward)), where=step > 0)
        whole = np.floor(count * (1 + 1e-9)).astype(np.int64)
        caps += [np.clip(whole + extra, 1, room) for extra in (0, 1)]
    return [*caps, room]


def portfolio(problem: Problem, *, wide: bool) -> Policies:
    """The policies to try: about a hundred, or most of a thousand if `wide`; seven times that if a full B can pay."""
    ranks, stages = problem.ranks, len(problem.placement)
    rank = np.arange(ranks)
    shares = (0, 0.2, 0.4, 0.6, 0.8, 1, 1.3, 1.6, 2, 3) if wide else (0, 0.4, 0.8, 1.3)
    waits = (0, 0.5, 0.9) if wide else (0, 0.5)
    rules = range(3) if wide else range(2)
    unbounded = 0 * rank + problem.microbatches
    defers = (unbounded, rank, 2 * rank, 0 * rank) if wide else (unbounded, rank)
    deep: tuple[tuple[int, int], ...] = ((0, 0),)
    if stages > ranks:
        deep = ((0, 1), (1, 1), (0, 0), (1, 0)) if wide else ((0, 1), (1, 1))
    fuses = [(list_scheduler.FUSE_NEVER, 0 * rank, 0 * rank)]
    if is_fusable(problem):
        fuses += [(list_scheduler.FUSE_ALWAYS, 0 * rank, 0 * rank), (list_scheduler.FUSE_AT_ONCE, 0 * rank, 0 * rank)]
        fuses += [(list_scheduler.FUSE_MIDDLE, head, tail) for head in (0 * rank, rank) for tail in (rank, 2 * rank)]
    policy, cap, fuse = [], [], []
    grid = itertools.product(rules, waits, waits, _caps(problem, shares), range(len(defers)), deep, fuses)
    for rule, wait_forward, wait_weight, each_cap, defer, (deep_forward, deep_backward), (
        each_fuse,
        head,
        tail,
    ) in grid:
        if (defer > 0 and wait_weight > 0) or (rule == list_scheduler.FORWARD_FIRST and wait_forward > 0):
            continue  # the wait would hardly ever matter
        row = np.empty((ranks, list_scheduler.COLUMNS))
        row[:, list_scheduler.RULE] = rule
        row[:, list_scheduler.WAIT_FORWARD], row[:, list_scheduler.WAIT_WEIGHT] = wait_forward, wait_weight
        row[:, list_scheduler.DEFER] = defers[defer]
        row[:, list_scheduler.DEEP_FORWARD], row[:, list_scheduler.DEEP_BACKWARD] = deep_forward, deep_backward
        row[:, list_scheduler.SPLIT_HEAD], row[:, list_scheduler.SPLIT_TAIL] = head, tail
        policy.append(row)
        cap.append(each_cap)
        fuse.append(np.full(stages, each_fuse, np.int64))
    return Policies(policy=np.array(policy), cap=np.array(cap), fuse=np.array(fuse))
