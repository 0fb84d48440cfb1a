"""Reduction: adding up each stage's gradients over data-parallel replicas (REDUCE_GRAD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ppsim.action import Kind
from ppsim.costs import StageCost

if TYPE_CHECKING:
    from ppsim.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """An all-reduce of every stage's gradients over `replicas`, by a ring (Patarasuk and Yuan, 2009).

    A ring of d replicas takes 2 (d - 1) rounds, each of one d-th of the gradients: 2 (d - 1) (latency_s + bytes / (d
    bytes_per_s)). A stage's starts as its last backward (B, or W) ends and the reduction before it on its rank has
    ended; computation goes on meanwhile and is not slowed. The gradients are as large as the parameters.
    """

    replicas: int
    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise ValueError(f"replicas must be a whole number of 1 or more, got {self.replicas!r}")
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")

    def seconds(self, size_bytes: int) -> float:
        """What adding up gradients of that size takes."""
        rounds = 2 * (self.replicas - 1)
        return rounds * (self.latency_s + size_bytes / self.replicas / self.bytes_per_s)

    def added_to(self, trace: Trace, stages: Sequence[StageCost]) -> Trace:
        """The trace with its reductions; unchanged for one replica or an evaluation."""
        program = trace.program
        if self.replicas == 1 or program.schedule.is_forward_only:
            return trace
        count = program.schedule.stages
        ends = (program.kind == Kind.B) | (program.kind == Kind.W)
        ready_s = np.full(count, -np.inf)
        np.maximum.at(ready_s, program.stage[ends], trace.end_s[ends])
        start_s, end_s = np.empty(count), np.empty(count)
        free_s = np.full(program.ranks, -np.inf)
        for stage in np.argsort(ready_s, kind="stable").tolist():
            rank = program.schedule.placement[stage]
            start_s[stage] = max(ready_s[stage], free_s[rank])
            free_s[rank] = end_s[stage] = start_s[stage] + self.seconds(stages[stage].parameter_bytes)
        sizes = np.array([stage.parameter_bytes for stage in stages], np.int64)
        return replace(trace, reduce_start_s=start_s, reduce_end_s=end_s, reduce_bytes=sizes)
