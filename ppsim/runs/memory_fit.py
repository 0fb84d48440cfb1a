"""Memory fit: what a microbatch holds and what a rank holds besides, from how much each rank held at most."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.runs.run import Run
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.memory_levels import activation_levels
from ppsim.trace.memory import peak_per_rank
from ppsim.trace.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryFit:
    """What ranks hold.

    Parameters
    ----------
    activation_bytes : int or None
        What a microbatch holds on a rank, all of its stages together. None where the run does not tell.
    other_bytes : array of shape (p,)
        What each rank holds besides.
    """

    activation_bytes: int | None
    other_bytes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, run: Run) -> MemoryFit | None:
        """Fit a line to the peaks of a run over its ranks. None if the run has no peaks.

        Where the run tells activations and other memory apart, nothing is fitted.

        Notes
        -----
        Ranks hold different numbers of microbatches at most. The slope is the median of those between any two ranks
        with the same layers (Theil and Sen), where ranks with the first and the last stage, which hold an embedding
        and a head besides, are left out if others are enough. The peak is the largest of any step, as a reserve that
        has grown stays.
        """
        peaks = [trace.total_peak_bytes for trace in run.traces if trace.total_peak_bytes is not None]
        if not peaks:
            return cls._told_apart(run.median)
        most = np.max(peaks, axis=0).astype(np.float64)
        held = in_flight(run.schedule)
        ends = {run.schedule.placement[0], run.schedule.placement[-1]}
        inner = [rank for rank in range(run.ranks) if rank not in ends]
        if len({held[rank] for rank in inner}) < 2:
            inner = list(range(run.ranks))
        slopes = [(most[a] - most[b]) / (held[a] - held[b]) for a, b in combinations(inner, 2) if held[a] != held[b]]
        if not slopes:
            whole = np.rint(most).astype(np.int64)
            return cls(activation_bytes=None, other_bytes=whole)
        slope = max(float(np.median(slopes)), 0.0)
        besides = most - slope * held
        usual = float(np.median(besides[inner]))
        other = np.array([usual if rank in inner else besides[rank] for rank in range(run.ranks)])
        return cls(
            activation_bytes=round(slope),
            other_bytes=np.maximum(np.rint(other), 0).astype(np.int64),
        )

    @classmethod
    def _told_apart(cls, trace: Trace) -> MemoryFit | None:
        """What a rank holds at most in all, less its activations. None if no other memory is known."""
        held, total = trace.peak_activation_bytes, trace.memory.total_bytes
        if held is None or total is None or trace.parameter_bytes is None:
            return None
        return cls(activation_bytes=None, other_bytes=total - held)


def in_flight(schedule: Schedule) -> npt.NDArray[np.float64]:
    """How many microbatches each rank holds at most, shape (p,); one that is on one of two stages counts half."""
    count = np.bincount(np.asarray(schedule.placement), minlength=schedule.ranks)
    unit = StageCost(
        forward_s=0, backward_input_s=0, backward_weight_s=0, activation_bytes=1, weight_activation_bytes=1
    )
    levels = activation_levels(schedule.program, [unit] * schedule.stages)
    return peak_per_rank(schedule.program, levels) / np.maximum(count, 1)
