"""Problem: the input of a search, and the same as arrays for the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_memory, check_whole
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.placement import loop_placement, v_placement

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

AHEAD, BACK = 0, 1  # directions of messages: rows of the tables' arrays
UNLIMITED_BYTES = 1 << 60  # more than any device holds; sums of a few such numbers still fit 64 bits
_PLACEMENTS = {"loop": loop_placement, "v": v_placement}
_ACTION_BYTES = 100  # memory for each action while orders are compared, at least
_OBJECTIVES = ("makespan", "rank_time")


class Tables(NamedTuple):
    """A problem as the arrays that the compiled kernels read: S stages, p ranks, m microbatches.

    Compiled code addresses the fields by position, so `ppsim.kernel_cache` compiles anew when this file changes.
    The arrays of messages have a row for each direction: `AHEAD` from stage s to s + 1, `BACK` from s to s - 1.

    Parameters
    ----------
    duration_s : (4, S)
        Seconds of an action that runs alone; the row is its `Kind`: F, B, I or W.
    communication_s : (4, S)
        The part of these seconds in which it communicates. In an overlapped pair this runs under the other's compute.
    held_bytes : (S,)
        Activation bytes of a microbatch from the start of F to the end of its backward (B or I).
    kept_bytes : (S,)
        What is held instead from the end of I to the end of W.
    rank : (S,)
        The rank of each stage.
    first, stages : (p + 1,), (S,)
        Rank r holds ``stages[first[r]:first[r + 1]]``, ascending.
    link : (2, S)
        The number of the directed link that a stage's message takes; -1 where both stages are on one rank.
    occupied_s, latency_s : (2, S)
        How long the message occupies its link, and how much later it arrives.
    links : int
        How many links there are.
    microbatches : int
        m.
    limit_bytes : (p,)
        The most activation bytes that each rank may hold.
    by_rank_time : bool
        Whether the objective is the longest rank time (from a rank's first start to its last end), not the makespan.
    full_backward_pays : bool
        Whether B is shorter than I and W together on any stage.
    """

    duration_s: Floats
    communication_s: Floats
    held_bytes: Integers
    kept_bytes: Integers
    rank: Integers
    first: Integers
    stages: Integers
    link: Integers
    occupied_s: Floats
    latency_s: Floats
    links: int
    microbatches: int
    limit_bytes: Integers
    by_rank_time: bool
    full_backward_pays: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One search: what the stages cost, where they are, which links join them, and what is asked for.

    Parameters
    ----------
    costs : one `StageCost` per stage
    ranks, microbatches : int
        p and m.
    placement : (stages,)
        The rank of each stage.
    network : Network
        The links between ranks.
    limit_bytes : (p,)
        The most that `peak_activation_bytes` may be on each rank; `UNLIMITED_BYTES` for no limit.
    by_rank_time : bool
        Minimise the longest rank time (from a rank's first start to its last end) instead of the makespan.
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
        """v, how many stages each rank holds."""
        return len(self.placement) // self.ranks

    @property
    def is_v(self) -> bool:
        """Whether the placement is a V: rank r holds stages r and 2p - 1 - r."""
        return self.stages_per_rank == 2 and self.placement == v_placement(self.ranks, 2)

    @property
    def actions(self) -> int:
        """How many F, I and W a step has: the unit in which the search counts its effort."""
        return 3 * len(self.placement) * self.microbatches

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, ascending."""
        return [stage for stage, holder in enumerate(self.placement) if holder == rank]

    def with_limit(self, limit_bytes: Integers) -> Problem:
        """The same problem under another limit, shape (p,)."""
        return replace(self, limit_bytes=limit_bytes)

    def with_durations(self, duration_s: Floats) -> Problem:
        """The same problem with these seconds of each kind and stage, shape (4, S), and without communication.

        Seconds below 0, which are the rounding of a difference, count as 0.
        """
        forward_s, full_s, input_s, weight_s = duration_s.tolist()  # in the sequence of the kinds' numbers
        costs = [
            replace(
                cost,
                forward_s=max(0.0, forward_s[stage]),
                backward_s=max(0.0, full_s[stage]),
                backward_input_s=max(0.0, input_s[stage]),
                backward_weight_s=max(0.0, weight_s[stage]),
                forward_communication_s=0.0,
                backward_input_communication_s=0.0,
                backward_weight_communication_s=0.0,
                backward_communication_s=None,
            )
            for stage, cost in enumerate(self.costs)
        ]
        return replace(self, costs=tuple(costs))

    def with_microbatches(self, microbatches: int) -> Problem:
        """The same problem with another number of microbatches."""
        return replace(self, microbatches=microbatches)

    @cached_property
    def smallest_limit_bytes(self) -> Integers:
        """The smallest limit under which an order exists, shape (p,): one microbatch on all stages of a rank.

        Notes
        -----
        Every order needs this much: when a rank first runs a backward, of microbatch b on its last stage, it holds the
        activations of b on all of its stages. It is enough: run one microbatch at a time, with full backwards.
        """
        held = np.array([cost.activation_bytes for cost in self.costs], np.int64)
        return np.bincount(self.placement, held, self.ranks).astype(np.int64)

    @cached_property
    def tables(self) -> Tables:
        """The problem as the arrays that the compiled kernels read."""
        costs, rank = self.costs, np.array(self.placement, np.int64)
        duration_s, communication_s = np.empty((2, 4, len(costs)))
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            duration_s[kind] = [cost.alone_s[kind.name] for cost in costs]
            communication_s[kind] = [cost.communication_s[kind.name] for cost in costs]
        counts = np.bincount(rank, minlength=self.ranks)
        link, occupied_s, latency_s = self._messages()
        return Tables(
            duration_s=duration_s,
            communication_s=communication_s,
            held_bytes=np.array([cost.activation_bytes for cost in costs], np.int64),
            kept_bytes=np.array([cost.weight_activation_bytes for cost in costs], np.int64),
            rank=rank,
            first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            stages=np.argsort(rank, kind="stable").astype(np.int64),
            link=link,
            occupied_s=occupied_s,
            latency_s=latency_s,
            links=int(link.max()) + 1,
            microbatches=self.microbatches,
            limit_bytes=self.limit_bytes,
            by_rank_time=self.by_rank_time,
            full_backward_pays=bool((duration_s[Kind.B] < duration_s[Kind.I] + duration_s[Kind.W]).any()),
        )

    def _messages(self) -> tuple[Integers, Floats, Floats]:
        """Link, occupation and latency of every stage's messages, shape (2, S) each."""
        stages = len(self.costs)
        link = np.full((2, stages), -1, np.int64)
        occupied_s, latency_s = np.zeros((2, stages)), np.zeros((2, stages))
        numbers: dict[tuple[int, int], int] = {}
        for direction, step in ((AHEAD, +1), (BACK, -1)):
            for stage in range(stages):
                target = stage + step
                if not 0 <= target < stages or self.placement[stage] == self.placement[target]:
                    continue
                pair = (self.placement[stage], self.placement[target])
                model = self.network.link(*pair)
                lower = self.costs[min(stage, target)]
                size_bytes = lower.output_bytes if direction == AHEAD else lower.backward_message_bytes
                link[direction, stage] = numbers.setdefault(pair, len(numbers))
                occupied_s[direction, stage] = model.occupied_s(size_bytes)
                latency_s[direction, stage] = model.piece(size_bytes).latency_s
        return link, occupied_s, latency_s


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
    """Build a problem from what `ppsim.search` is given; see there for the parameters.

    Raises
    ------
    InputError
        For a value out of range, for a number of costs that does not fit the ranks, and for a limit under which no
        order exists. The message names the value and the remedy.
    """
    counts = (("ranks", ranks), ("microbatches", microbatches), ("stages_per_rank", stages_per_rank))
    for name, value in counts:
        check_whole(name, value)
    if placement not in _PLACEMENTS:
        raise InputError(f"placement must be 'loop' or 'v', got {placement!r}")
    if placement == "v" and stages_per_rank != 2:
        raise InputError(f"placement 'v' has 2 stages per rank, got stages_per_rank={stages_per_rank}: set it to 2")
    if objective not in _OBJECTIVES:
        raise InputError(f"objective must be 'makespan' or 'rank_time', got {objective!r}")
    if len(costs) != ranks * stages_per_rank:
        raise InputError(
            f"{len(costs)} stage costs for {ranks} ranks with {stages_per_rank} stage(s) each: "
            f"give {ranks * stages_per_rank}"
        )
    check_memory(
        f"a search over {len(costs)} stages and {microbatches} microbatches",
        _ACTION_BYTES * 3 * len(costs) * microbatches,
        "take fewer microbatches",
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
    tables = problem.tables
    with np.errstate(over="ignore"):
        # Beyond what any order takes, with room for the sums that kernels make.
        longest_s = 3 * microbatches * (tables.duration_s.sum() + tables.occupied_s.sum() + tables.latency_s.sum())
    if not math.isfinite(longest_s):
        raise InputError("the step may take longer than a float holds: give smaller costs, or a higher bytes_per_s")
    short = np.flatnonzero(problem.limit_bytes < problem.smallest_limit_bytes)
    if len(short):
        rank = int(short[0])
        least = problem.smallest_limit_bytes
        raise InputError(
            f"no order fits memory_limit_bytes: rank {rank} may hold {problem.limit_bytes[rank]} bytes, but one "
            f"microbatch on its stages holds {least[rank]}; the smallest limit that fits is {least.max()} for all "
            f"ranks, or {least.tolist()} rank by rank"
        )
    return problem


def _limits(given: float | Sequence[float] | None, ranks: int) -> Integers:
    """One limit per rank in whole bytes, shape (p,)."""
    if given is None:
        return np.full(ranks, UNLIMITED_BYTES, np.int64)
    values = np.asarray(given, float)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != ranks):
        raise InputError(
            f"memory_limit_bytes has shape {values.shape}: give one number, or one for each of {ranks} ranks"
        )
    if np.isnan(values).any() or (values < 0).any():
        raise InputError(f"memory_limit_bytes must be bytes >= 0 (leave it out for no limit), got {given!r}")
    limits = [UNLIMITED_BYTES if value >= UNLIMITED_BYTES else math.floor(value) for value in np.atleast_1d(values)]
    return np.broadcast_to(np.array(limits, np.int64), (ranks,)).copy()
