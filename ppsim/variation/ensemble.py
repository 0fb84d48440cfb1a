"""Ensemble: statistics of many samples of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked, shown
from ppsim.conditions import Conditions
from ppsim.costs.by_microbatch import StageCosts
from ppsim.errors import InputError
from ppsim.schedule.program import Program
from ppsim.simulation.simulate import predicted
from ppsim.trace.trace import Trace
from ppsim.variation.jitter import Jitter
from ppsim.variation.sampler import Sampler
from ppsim.variation.sensitivity import sensitivity

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
_QUANTILES = (5, 50, 95, 99)
_MOST_STARTS = 2**27  # numbers: a gigabyte


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """n samples of one step, as `monte_carlo` makes them.

    Parameters
    ----------
    makespan_s, step_s : arrays of shape (n,)
        Of each sample. step_s includes reductions, and is the makespan without.
    rank_time_s, compute_s : arrays of shape (n, p)
        Of each rank, as in `Trace`.
    stages : sequence of StageCost, or of sequences of StageCost
        The mean costs.
    conditions : Conditions
        How each step was run.
    details : dict
        How the samples were made; JSON values.
    sampler : Sampler
        What made them. It draws them again when asked for more.
    """

    makespan_s: Seconds
    step_s: Seconds
    rank_time_s: Seconds
    compute_s: Seconds
    stages: StageCosts
    conditions: Conditions
    details: dict[str, Any]
    sampler: Sampler = field(repr=False)

    def __len__(self) -> int:
        return len(self.makespan_s)

    @property
    def program(self) -> Program:
        """The program that ran."""
        return self.sampler.times.timed.program

    @property
    def jitter(self) -> Jitter:
        """How costs varied."""
        return self.sampler.times.jitter

    @property
    def seed(self) -> int:
        """The seed that the samples were drawn from."""
        return self.sampler.times.seed

    @cached_property
    def bubble_fraction(self) -> Seconds:
        """The bubble fraction of each sample, shape (n,). It is 0 for a step without length."""
        total = self.program.ranks * self.makespan_s
        idle = total - self.compute_s.sum(axis=1)
        fraction: Seconds = np.divide(idle, total, out=np.zeros(len(self)), where=total > 0)
        return fraction

    @property
    def mean_s(self) -> float:
        """The mean step time."""
        return float(self.step_s.mean())

    @property
    def std_s(self) -> float:
        """The standard deviation of the step time, over n - 1. It is 0 for one sample."""
        return float(self.step_s.std(ddof=1)) if len(self) > 1 else 0.0

    @property
    def standard_error_s(self) -> float:
        """The standard deviation of the mean of n samples."""
        return float(self.std_s / len(self) ** 0.5)

    @checked
    def percentile(self, q: float | Sequence[float]) -> Any:
        """The step time that q percent of the samples do not exceed. An array for several q."""
        found = np.percentile(self.step_s, _percents(q))
        return float(found) if found.ndim == 0 else found

    @property
    def percentiles_s(self) -> dict[str, float]:
        """p5, p50, p95 and p99 of the step time."""
        return {f"p{q}": self.percentile(q) for q in _QUANTILES}

    @checked
    def quantiles(self, q: Sequence[float] = (1, 5, 25, 50, 75, 95, 99)) -> pandas.DataFrame:
        """Percentiles as a table, one row per q: makespan_s, step_s, bubble_fraction, and rank_time_s of each rank."""
        import pandas

        percents = _percents(q)
        columns = {"makespan_s": self.makespan_s, "step_s": self.step_s, "bubble_fraction": self.bubble_fraction}
        columns |= {f"rank_time_s[{rank}]": self.rank_time_s[:, rank] for rank in range(self.program.ranks)}
        found = {name: np.percentile(column, percents) for name, column in columns.items()}
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
            "engine": self.sampler.engine,
            "jitter": self.jitter.to_dict(),
            "step_time_mean_s": self.mean_s,
            "step_time_std_s": self.std_s,
            "step_time_percentiles_s": self.percentiles_s,
            "bubble_fraction_mean": float(self.bubble_fraction.mean()),
            "rank_time_mean_s": self.rank_time_s.mean(axis=0).tolist(),
            "conditions": self.conditions.to_dict(),
            "details": self.details,
        }

    @checked
    def trace(self, sample: int) -> Trace:
        """The whole trace of one sample, drawn again from the seed.

        Parameters
        ----------
        sample : int
            From 0 to n - 1.

        Returns
        -------
        Trace
            Its `makespan_s` and `step_s` are those of the sample to the last bit.

        Raises
        ------
        InputError
            For a sample that does not exist.
        """
        if not 0 <= sample < len(self):
            raise InputError(f"there is no sample {sample}: they are numbered 0 to {len(self) - 1}")
        return predicted(
            self.sampler.times.sample(sample),
            self.stages,
            engine=self.sampler.engine,
            conditions=self.conditions,
            details={**self.details, "sample": sample},
        )

    @checked
    def nearest(self, q: float) -> int:
        """The number of the sample whose step is nearest to the q-th percentile. The first, if there are several."""
        return int(np.argmin(np.abs(self.step_s - self.percentile(q))))

    @checked
    def start_quantiles_s(self, q: Sequence[float] = (5, 50, 95)) -> Seconds:
        """Percentiles of when each row starts, counted from the first start of its step.

        Parameters
        ----------
        q : sequence of floats
            Percents.

        Returns
        -------
        array of shape (len(q), rows)
            Seconds. Starts are not kept, so the samples are drawn and run again.

        Raises
        ------
        InputError
            Where all starts together would need more than a gigabyte.
        """
        percents = _percents(q)
        rows = len(self.program.stage)
        if rows * len(self) > _MOST_STARTS:
            most = _MOST_STARTS // rows
            raise InputError(f"{len(self)} samples of {rows} starts do not fit: take at most {most} samples")
        start_s = self.sampler.run(len(self), with_starts=True).start_s
        start_s -= start_s.min(axis=1, keepdims=True)
        return np.percentile(start_s, percents, axis=0)

    def sensitivity(self) -> pandas.DataFrame:
        """What the jitter of each kind, each rank and each link costs.

        Returns
        -------
        pandas.DataFrame
            A row for each kind of jitter that varies ("actions", "ranks", "step", "messages", "hiccups", "dispatch",
            "late"), for each rank, and for each link if messages vary. Columns, in seconds: saved_s, how much shorter
            the mean makespan is if this part alone does not vary; alone_s, how much longer than without any jitter it
            is if only this part varies.

        Notes
        -----
        All numbers come from the same random numbers, each from a run of all samples. They need not add up. For ranks
        and links alone_s leaves out the factor of the whole step.
        """
        return sensitivity(self.sampler, len(self))


def _percents(q: float | Sequence[float]) -> Seconds:
    percents = np.asarray(q, np.float64)
    if percents.ndim > 1 or not ((percents >= 0) & (percents <= 100)).all():
        raise InputError(f"q must be percents from 0 to 100, got {shown(q)}")
    return percents
