"""Ensemble: what many samples of a step say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.network.all_reduce import Reduction
from ppsim.schedule.program import Program
from ppsim.simulation.simulate import predicted
from ppsim.trace.trace import Trace
from ppsim.variation.jitter import Jitter
from ppsim.variation.sampler import Runner

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
_QUANTILES = (5, 50, 95, 99)
_MOST_STARTS = 2**27  # numbers: a gigabyte


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """n samples of one step, as `monte_carlo` makes them.

    makespan_s, step_s: shape (n,); step_s includes reductions, and is the makespan without. rank_time_s, compute_s:
    shape (n, p), as in `Trace`. stages, reduction, details, runner: what they were made from.
    """

    makespan_s: Seconds
    step_s: Seconds
    rank_time_s: Seconds
    compute_s: Seconds
    stages: tuple[StageCost, ...]
    reduction: Reduction | None
    details: dict[str, Any]
    runner: Runner = field(repr=False)

    def __len__(self) -> int:
        return len(self.makespan_s)

    @property
    def program(self) -> Program:
        """What ran."""
        return self.runner.draws.load.program

    @property
    def jitter(self) -> Jitter:
        """What varied."""
        return self.runner.draws.jitter

    @property
    def seed(self) -> int:
        """What the samples were drawn from."""
        return self.runner.draws.seed

    @cached_property
    def bubble_fraction(self) -> Seconds:
        """Of each sample, shape (n,); 0 for a step without length."""
        total = self.program.ranks * self.makespan_s
        idle = total - self.compute_s.sum(axis=1)
        return np.divide(idle, total, out=np.zeros(len(self)), where=total > 0)

    @property
    def mean_s(self) -> float:
        """The mean step."""
        return float(self.step_s.mean())

    @property
    def std_s(self) -> float:
        """The standard deviation of the step (of the distribution sampled: over n - 1); 0 for one sample."""
        return float(self.step_s.std(ddof=1)) if len(self) > 1 else 0.0

    @property
    def standard_error_s(self) -> float:
        """How far the mean of n samples is off, as a standard deviation."""
        return self.std_s / len(self) ** 0.5

    def percentile(self, q: float | Sequence[float]) -> Any:
        """The step time that q percent of the samples do not exceed; a number, or an array for several q."""
        found = np.percentile(self.step_s, q)
        return float(found) if found.ndim == 0 else found

    @property
    def percentiles_s(self) -> dict[str, float]:
        """The step's p5, p50, p95 and p99."""
        return {f"p{q}": self.percentile(q) for q in _QUANTILES}

    def quantiles(self, q: Sequence[float] = (1, 5, 25, 50, 75, 95, 99)) -> pandas.DataFrame:
        """Percentiles as a table, a row per q: makespan_s, step_s, bubble_fraction, and rank_time_s of each rank."""
        import pandas

        columns = {"makespan_s": self.makespan_s, "step_s": self.step_s, "bubble_fraction": self.bubble_fraction}
        columns |= {f"rank_time_s[{rank}]": self.rank_time_s[:, rank] for rank in range(self.program.ranks)}
        found = {name: np.percentile(column, list(q)) for name, column in columns.items()}
        return pandas.DataFrame(found, index=pandas.Index(list(q), name="percentile"))

    def to_frame(self) -> pandas.DataFrame:
        """One row per sample: makespan_s, step_s, bubble_fraction, and rank_time_s and compute_s of each rank."""
        import pandas

        columns = {"makespan_s": self.makespan_s, "step_s": self.step_s, "bubble_fraction": self.bubble_fraction}
        for name in ("rank_time_s", "compute_s"):
            columns |= {f"{name}[{rank}]": getattr(self, name)[:, rank] for rank in range(self.program.ranks)}
        return pandas.DataFrame(columns).rename_axis("sample")

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {
            "samples": len(self),
            "seed": self.seed,
            "engine": self.runner.engine,
            "jitter": self.jitter.to_dict(),
            "step_time_mean_s": self.mean_s,
            "step_time_std_s": self.std_s,
            "step_time_percentiles_s": self.percentiles_s,
            "bubble_fraction_mean": float(self.bubble_fraction.mean()),
            "rank_time_mean_s": self.rank_time_s.mean(axis=0).tolist(),
            "details": self.details,
        }

    def trace(self, sample: int) -> Trace:
        """The whole trace of one sample, drawn anew from the seed: its makespan is `makespan_s[sample]` to the last
        bit. Raises ValueError for a sample that there is not."""
        if not 0 <= sample < len(self):
            raise ValueError(f"there is no sample {sample}: they are numbered 0 to {len(self) - 1}")
        engine = self.runner.engine
        details = {"engine": engine, "overlap": 1.0, **self.details, "sample": sample}
        trace = predicted(self.runner.draws.sample(sample), self.stages, engine=engine, details=details)
        return trace if self.reduction is None else self.reduction.added_to(trace, self.stages)

    def nearest(self, q: float) -> int:
        """The number of the sample whose step is nearest to the q-th percentile; the first of several."""
        return int(np.argmin(np.abs(self.step_s - self.percentile(q))))

    def start_quantiles_s(self, q: Sequence[float] = (5, 50, 95)) -> Seconds:
        """Percentiles of when each row starts, from its own step's first start; shape (len(q), rows).

        The samples are drawn and run again, since their starts are not kept. Raises ValueError where they would need
        more than a gigabyte.
        """
        rows = len(self.program.stage)
        if rows * len(self) > _MOST_STARTS:
            most = _MOST_STARTS // rows
            raise ValueError(f"{len(self)} samples of {rows} starts do not fit: take at most {most} samples")
        start_s = self.runner.run(len(self), with_starts=True).start_s
        start_s -= start_s.min(axis=1, keepdims=True)
        return np.percentile(start_s, list(q), axis=0)

    def sensitivity(self) -> pandas.DataFrame:
        """Whose jitter costs most: a row for each rank, each link, and each kind of jitter.

        saved_s: how much shorter the mean makespan is if this rank, link or kind alone does not vary (what removing its
        jitter is worth). alone_s: how much longer than without any jitter it is if only this one varies. Both by the
        same random numbers, with the factor common to a whole step left out for ranks and links in alone_s. They need
        not add up. A run of all samples for every number.
        """
        from ppsim.variation.sensitivity import sensitivity

        return sensitivity(self.runner, len(self))
