"""Samples: what an engine answers for many samples of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is kept of n samples.

    first_start_s, last_end_s, compute_s: of each rank, shape (n, p); the first two are the step's first start on a rank
    without actions.
    watched_end_s: when the rows asked for ended, shape (n, watched). start_s: of every row, shape (n, rows), where
    asked for, else (0, rows).
    """

    first_start_s: Seconds
    last_end_s: Seconds
    compute_s: Seconds
    watched_end_s: Seconds
    start_s: Seconds

    @property
    def makespan_s(self) -> Seconds:
        """Of each sample, shape (n,)."""
        return self.last_end_s.max(axis=1) - self.step_start_s

    @property
    def step_start_s(self) -> Seconds:
        """The first start in each sample, shape (n,)."""
        return self.first_start_s.min(axis=1)
