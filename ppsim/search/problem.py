"""Problem: what is searched, as arrays that the compiled kernels read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.schedule import loop_placement, v_placement

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

UNLIMITED_BYTES = 1 << 60
_PLACEMENTS = {"loop": loop_placement, "v": v_placement}
_OBJECTIVES = ("makespan", "rank_time")


class Tables(NamedTuple):
    """What the kernels read; S stages, p ranks, seconds and bytes.

    duration: (4, S), row = Kind. held, kept: (S,), activation bytes from F to the backward's end, and from I to W.
    rank: (S,). first, stages: rank r holds stages[first[r]:first[r + 1]], ascending. ahead_*, back_*: (S,), the
    directed link from stage s to s + 1 and from s to s - 1: its number (-1: no message), occupation, latency.
    links: (1,), their number.
    """

    duration: Floats
    held: Integers
    kept: Integers
    rank: Integers
    first: Integers
    stages: Integers
    ahead_link: Integers
    ahead_occupied: Floats
    ahead_latency: Floats
    back_link: Integers
    back_occupied: Floats
    back_latency: Floats
    links: Integers


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One search: stages' costs, where they live, links, the limit per rank, and what is to be small.

    limit_bytes: shape (p,), the largest `peak_activation_bytes` of each rank; UNLIMITED_BYTES for none.
    """

    costs: tuple[StageCost, ...]
    ranks: int
    microbatches: int
    placement: tuple[int, ...]
    network: Network = field(default_factory=Network)
    limit_bytes: Integers
    by_rank_time: bool = False

    @property
    def stages_per_rank(self) -> int:
        """v."""
        return len(self.placement) // self.ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, ascending."""
        return [stage for stage, holder in enumerate(self.placement) if holder == rank]

    def with_limit(self, limit_bytes: Integers) -> Problem:
        """The same problem under another limit, shape (p,)."""
        return replace(self, limit_bytes=limit_bytes)

    def with_microbatches(self, microbatches: int) -> Problem:
        """The same problem with another number of microbatches."""
        return replace(self, microbatches=microbatches)

    @cached_property
    def smallest_limit_bytes(self) -> Integers:
        """The smallest limit that anything fits, shape (p,): the activations of one microbatch on all stages of a rank.

        When a rank starts its first backward, of a microbatch b and necessarily of its last stage, it has run F of b
        on each of its stages and released nothing: no order needs less. One microbatch after the other with full
        backwards needs no more.
        """
        held = np.array([cost.activation_bytes for cost in self.costs], np.int64)
        return np.bincount(self.placement, held, self.ranks).astype(np.int64)

    @cached_property
    def tables(self) -> Tables:
        """The problem as arrays."""
        costs, rank = self.costs, np.array(self.placement, np.int64)
        duration = np.empty((4, len(costs)))
        duration[Kind.F] = [cost.forward_s for cost in costs]
        duration[Kind.B] = [cost.full_backward_s for cost in costs]
        duration[Kind.I] = [cost.backward_input_s for cost in costs]
        duration[Kind.W] = [cost.backward_weight_s for cost in costs]
        numbers: dict[tuple[int, int], int] = {}
        ahead = self._hops(range(len(costs) - 1), +1, numbers)
        back = self._hops(range(1, len(costs)), -1, numbers)
        counts = np.bincount(rank, minlength=self.ranks)
        return Tables(
            duration=duration,
            held=np.array([cost.activation_bytes for cost in costs], np.int64),
            kept=np.array([cost.weight_activation_bytes for cost in costs], np.int64),
            rank=rank,
            first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            stages=np.argsort(rank, kind="stable").astype(np.int64),
            ahead_link=ahead[0],
            ahead_occupied=ahead[1],
            ahead_latency=ahead[2],
            back_link=back[0],
            back_occupied=back[1],
            back_latency=back[2],
            links=np.array([len(numbers)], np.int64),
        )

    def _hops(self, stages: range, step: int, numbers: dict[tuple[int, int], int]) -> tuple[Integers, Floats, Floats]:
        link = np.full(len(self.costs), -1, np.int64)
        occupied, latency = np.zeros(len(self.costs)), np.zeros(len(self.costs))
        for stage in stages:
            pair = (self.placement[stage], self.placement[stage + step])
            if pair[0] == pair[1]:
                continue
            model = self.network.link(*pair)
            link[stage] = numbers.setdefault(pair, len(numbers))
            size_bytes = self.costs[min(stage, stage + step)].output_bytes
            occupied[stage], latency[stage] = model.occupied_s(size_bytes), model.piece(size_bytes).latency_s
        return link, occupied, latency


def make_problem(
    costs: Sequence[StageCost],
    *,
    ranks: int,
    microbatches: int,
    network: Network | None,
    memory_limit_bytes: float | Sequence[float] | None,
    stages_per_rank: int,
    placement: str,
    objective: str,
) -> Problem:
    """A problem from what a user gives. Raises ValueError that names the value and the remedy."""
    counts = (("ranks", ranks), ("microbatches", microbatches), ("stages_per_rank", stages_per_rank))
    for name, value in counts:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    if placement not in _PLACEMENTS:
        raise ValueError(f"placement must be 'loop' or 'v', got {placement!r}")
    if placement == "v" and stages_per_rank != 2:
        raise ValueError(f"placement 'v' has 2 stages per rank, got stages_per_rank={stages_per_rank}: set it to 2")
    if objective not in _OBJECTIVES:
        raise ValueError(f"objective must be 'makespan' or 'rank_time', got {objective!r}")
    if len(costs) != ranks * stages_per_rank:
        raise ValueError(
            f"{len(costs)} stage costs for {ranks} ranks with {stages_per_rank} stage(s) each: "
            f"give {ranks * stages_per_rank}"
        )
    problem = Problem(
        costs=tuple(costs),
        ranks=int(ranks),
        microbatches=int(microbatches),
        placement=_PLACEMENTS[placement](int(ranks), int(stages_per_rank)),
        network=Network() if network is None else network,
        limit_bytes=_limits(memory_limit_bytes, int(ranks)),
        by_rank_time=objective == "rank_time",
    )
    short = np.flatnonzero(problem.limit_bytes < problem.smallest_limit_bytes)
    if len(short):
        rank = int(short[0])
        least = problem.smallest_limit_bytes
        raise ValueError(
            f"no order fits memory_limit_bytes: rank {rank} may hold {problem.limit_bytes[rank]} bytes, but one "
            f"microbatch on its stages holds {least[rank]}; the smallest limit that fits is {least.max()} for all "
            f"ranks, or {least.tolist()} rank by rank"
        )
    return problem


def _limits(given: float | Sequence[float] | None, ranks: int) -> Integers:
    if given is None:
        return np.full(ranks, UNLIMITED_BYTES, np.int64)
    values = np.asarray(given, float)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != ranks):
        raise ValueError(
            f"memory_limit_bytes has shape {values.shape}: give one number, or one for each of {ranks} ranks"
        )
    if np.isnan(values).any() or (values < 0).any():
        raise ValueError(f"memory_limit_bytes must be bytes >= 0 (leave it out for no limit), got {given!r}")
    limits = [UNLIMITED_BYTES if value >= UNLIMITED_BYTES else math.floor(value) for value in np.atleast_1d(values)]
    return np.broadcast_to(np.array(limits, np.int64), (ranks,)).copy()
