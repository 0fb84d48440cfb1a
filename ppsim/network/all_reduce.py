"""Reduction: adding up each stage's gradients over data-parallel replicas (REDUCE_GRAD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.schedule.action import Kind

if TYPE_CHECKING:
    from ppsim.trace.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """An all-reduce of every stage's gradients over `replicas`, by a ring (Patarasuk and Yuan, 2009).

    A ring of d replicas takes 2 (d - 1) rounds, each of one d-th of the gradients: 2 (d - 1) (latency_s + bytes / (d
    bytes_per_s)). A stage's starts as its last backward (B, or W) ends and the reduction before it on its rank has
    ended; computation goes on meanwhile and is not slowed. The gradients are those of the trained weights
    (`StageCost.trained_bytes`). The sum of two copies of one weight on two stages at the end of a step is not in it.
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

    @classmethod
    def fitted(
        cls, replicas: int, size_bytes: Sequence[float] | npt.NDArray, seconds: Sequence[float] | npt.NDArray
    ) -> Reduction:
        """The ring whose all-reduces of these sizes take these times, as nearly as a latency and a bandwidth can.

        Least squares of the errors relative to the time, so that small reductions count as large ones do. A latency or
        a bandwidth that would come out negative is left out (0, and no limit). Raises ValueError for fewer than 2
        replicas, lists of different length or empty ones, or numbers that are not finite, negative, or a time of 0.
        """
        sizes, times = np.asarray(size_bytes, float), np.asarray(seconds, float)
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 2:
            raise ValueError(f"replicas must be 2 or more to have something to fit, got {replicas!r}")
        if sizes.ndim != 1 or sizes.shape != times.shape or not len(sizes):
            raise ValueError(f"size_bytes and seconds must be lists of one length, got {sizes.shape} and {times.shape}")
        if not (np.isfinite(sizes).all() and np.isfinite(times).all() and (sizes >= 0).all() and (times > 0).all()):
            raise ValueError("size_bytes must be finite and >= 0, seconds finite and > 0")
        rounds = 2 * (replicas - 1)
        scale = float(sizes.max()) or 1.0
        matrix = np.column_stack([np.ones(len(sizes)), sizes / scale]) * (rounds / times)[:, None]
        fits = []
        for support in ([0, 1], [0], [1]):  # of fits that are as good the first
            part = matrix[:, support]
            values, _, rank, _ = np.linalg.lstsq(part, np.ones(len(times)), rcond=None)
            if rank == len(support) and (values >= 0).all():
                full = np.zeros(2)
                full[support] = values
                fits.append((float(((matrix @ full - 1) ** 2).sum()), full))
        _, (latency_s, part_s) = min(fits, key=lambda fit: fit[0])
        speed = scale / replicas / float(part_s) if part_s > 0 else math.inf
        return cls(replicas=replicas, latency_s=float(latency_s), bytes_per_s=speed)

    def seconds(self, size_bytes: int) -> float:
        """What adding up gradients of that size takes."""
        rounds = 2 * (self.replicas - 1)
        return rounds * (self.latency_s + size_bytes / self.replicas / self.bytes_per_s)

    def to_dict(self) -> dict[str, float | None]:
        """The ring as JSON values; no limit is None."""
        return {**asdict(self), "bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}

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
            free_s[rank] = end_s[stage] = start_s[stage] + self.seconds(stages[stage].trained_bytes)
        sizes = np.array([stage.trained_bytes for stage in stages], np.int64)
        return replace(trace, reduce_start_s=start_s, reduce_end_s=end_s, reduce_bytes=sizes)
