"""Question: which step the page wants to see, read from JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ppsim.checks import check_fields, check_names, check_whole
from ppsim.conditions import Conditions
from ppsim.costs.sharing import share_cost, stages_beside
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.network.all_reduce import Reduction
from ppsim.network.collectives import Collectives
from ppsim.network.host_link import HostLink
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.named.registry import build_schedule, natural_stages_per_rank
from ppsim.schedule.review import Review, review_csv
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace

MOST_ACTIONS = 60_000  # as many as the page draws at once without stopping for seconds


@dataclass(frozen=True, kw_only=True)
class Question:
    """A schedule, what its stages cost, and the links.

    Parameters
    ----------
    schedule : str or None
        A built-in schedule; with `ranks`, `microbatches` and perhaps `stages_per_rank`.
    csv : str or None
        A schedule in PyTorch's format, instead of these.
    copies : int
        Copies of the model that it is of.
    forward_s, backward_input_s, backward_weight_s : sequences of floats
        Seconds that a microbatch takes on a rank, shared evenly by the rank's stages: one number for all ranks, or one
        for each. So schedules with one and with several stages per rank are of one model. Or one for each stage, as
        they are.
    backward_s : sequence of floats
        Likewise of the full backward; empty for I + W.
    activation_bytes, weight_activation_bytes : int
        Bytes that a microbatch holds on a rank, shared likewise.
    output_bytes : int
        Bytes of a message between two stages.
    latency_s : float
        Of each link.
    bytes_per_s : float or None
        Of each link; None for no limit.
    recompute, offload : float
        Share of the microbatches of a built-in schedule whose forward is computed once more (R), or whose activations
        are moved to host memory and back (O, L).
    host_bytes_per_s : float or None
        Of each direction between a rank and its host's memory; None for no limit.
    replicas : int
        Data-parallel replicas.
    parameter_bytes : int
        Bytes of the parameters on a rank, shared likewise. Replicas add up gradients as large.
    replica_bytes_per_s : float or None
        Of the ring of replicas; None for no limit.
    whole_stages : int or None
        Parameters of a built-in schedule are sharded over replicas, and so many stages of each rank are whole at once.
        None: they are not sharded.
    run : str or None
        The number of a measured run to compare with.
    """

    schedule: str | None = None
    ranks: int | None = None
    microbatches: int | None = None
    stages_per_rank: int | None = None
    csv: str | None = None
    copies: int = 1
    forward_s: Sequence[float] = (1.0,)
    backward_input_s: Sequence[float] = (1.0,)
    backward_weight_s: Sequence[float] = (1.0,)
    backward_s: Sequence[float] = ()
    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    output_bytes: int = 0
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    recompute: float = 0.0
    offload: float = 0.0
    host_bytes_per_s: float | None = None
    replicas: int = 1
    parameter_bytes: int = 0
    replica_bytes_per_s: float | None = None
    whole_stages: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.csv is None) == (self.schedule is None):
            raise InputError("schedule and csv say the same: give one of the two")
        for name in ("forward_s", "backward_input_s", "backward_weight_s"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing: give seconds")
        for name in ("recompute", "offload"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise InputError(f"{name} must be from 0 to 1 (100 % of the microbatches), got {share}")
        check_whole("replicas", self.replicas)
        for name in ("host_bytes_per_s", "replica_bytes_per_s"):
            if (given := getattr(self, name)) is not None and not given > 0:
                raise InputError(f"{name} must be above 0, or None for no limit, got {given}")
        if self.whole_stages is not None and self.whole_stages < 1:
            raise InputError(f"whole_stages must be 1 or more, got {self.whole_stages}")

    @classmethod
    def from_dict(cls, given: Any) -> Question:
        """The question that a JSON object asks. Raises InputError for any other value."""
        check_names("a question", given, [each.name for each in fields(cls)])
        return cls(**given)

    def review(self) -> Review:
        """The schedule, and what is wrong with it if it is a text. Raises InputError if it cannot be built."""
        if self.csv is not None:
            return _within_bounds(review_csv(self.csv, name="custom", copies=self.copies))
        if self.schedule is None or self.ranks is None or self.microbatches is None:
            missing = "ranks" if self.ranks is None else "microbatches"
            raise InputError(f"{missing} is missing: give a whole number of 1 or more")
        v = natural_stages_per_rank(self.schedule) if self.stages_per_rank is None else self.stages_per_rank
        _check_actions((3 + (self.recompute > 0)) * max(self.ranks, 0) * max(v, 0) * max(self.microbatches, 0))
        schedule = build_schedule(
            self.schedule, ranks=self.ranks, microbatches=self.microbatches, stages_per_rank=self.stages_per_rank
        )
        schedule.check()
        schedule = schedule.with_recompute(share=self.recompute) if self.recompute else schedule
        schedule = schedule.with_offload(share=self.offload) if self.offload else schedule
        return Review(schedule=schedule.with_sharding(self.whole_stages), problems=())

    def costs(self, schedule: Schedule) -> list[StageCost]:
        """The cost of each stage. Raises InputError if there are not as many numbers as ranks or stages."""
        beside = stages_beside(schedule.placement, schedule.copies)
        full: Sequence[float | None] = [None] * schedule.stages
        if self.backward_s:
            full = self._by_stage("backward_s", schedule, beside)
        forward, backward_input, backward_weight = (
            self._by_stage(name, schedule, beside) for name in ("forward_s", "backward_input_s", "backward_weight_s")
        )
        whole = StageCost(
            forward_s=0,
            backward_input_s=0,
            backward_weight_s=0,
            activation_bytes=self.activation_bytes,
            weight_activation_bytes=self.weight_activation_bytes,
            output_bytes=self.output_bytes,
            parameter_bytes=self.parameter_bytes,
        )
        return [
            replace(
                part,
                forward_s=forward[stage],
                backward_input_s=backward_input[stage],
                backward_weight_s=backward_weight[stage],
                backward_s=full[stage],
            )
            for stage, part in enumerate(share_cost(whole, schedule.placement, schedule.copies))
        ]

    def _by_stage(self, name: str, schedule: Schedule, beside: Sequence[int]) -> list[float]:
        given = list(getattr(self, name))
        if len(given) == 1:
            given *= schedule.ranks
        if len(given) == schedule.ranks:
            return [given[rank] / count for rank, count in zip(schedule.placement, beside, strict=True)]
        if len(given) == schedule.stages:
            return given
        wanted = f"1 number, or {schedule.ranks}, one for each rank"
        if schedule.stages != schedule.ranks:
            wanted += f", or {schedule.stages}, one for each stage"
        raise InputError(f"{name} has {len(given)} numbers: give {wanted}")

    def network(self) -> Network:
        """The links."""
        return Network(latency_s=self.latency_s, bytes_per_s=_rate(self.bytes_per_s))

    def predicted(self, schedule: Schedule, stages: Sequence[StageCost]) -> Trace:
        """The step that is asked for. Raises InputError if it cannot be."""
        replicas, bytes_per_s = self.replicas, _rate(self.replica_bytes_per_s)
        is_sharded = bool((schedule.program.collectives.kind == Kind.UNSHARD).any())
        conditions = Conditions(
            host_link=HostLink(bytes_per_s=_rate(self.host_bytes_per_s)),
            reduction=Reduction(replicas=replicas, bytes_per_s=bytes_per_s)
            if replicas > 1 and not is_sharded
            else None,
            collectives=Collectives(replicas=replicas, bytes_per_s=bytes_per_s)
            if replicas > 1 and is_sharded
            else None,
        )
        return simulate(schedule, stages, network=self.network(), conditions=conditions, engine="compiled")


def _rate(bytes_per_s: float | None) -> float:
    return math.inf if bytes_per_s is None else bytes_per_s


def _within_bounds(review: Review) -> Review:
    if review.schedule is not None:
        _check_actions(sum(len(order.stage) for order in review.schedule.orders))
    return review


def _check_actions(count: int) -> None:
    if count > MOST_ACTIONS:
        raise InputError(
            f"microbatches, ranks and stages make up to {count} actions, the page draws at most {MOST_ACTIONS}: take "
            "fewer, or use ppsim simulate"
        )


def field_of(message: str) -> str | None:
    """The field of a question that a message begins with."""
    word = message.split(maxsplit=1)[0].split("[")[0].rstrip(",")
    return word if word in {each.name for each in fields(Question)} else None
