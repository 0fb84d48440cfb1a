"""Log-normal factors of mean 1: relative standard deviations, and variances of the logarithm."""

from __future__ import annotations

import math

MOST_RELATIVE = 100.0  # beyond, nearly all of the mean comes from factors that no sample has


def log_deviation(relative_std: float) -> float:
    """The standard deviation of the logarithm of a log-normal factor of mean 1: sqrt(ln(1 + c^2))."""
    return math.sqrt(math.log1p(relative_std**2))


def relative_deviation(log_variance: float) -> float:
    """The relative standard deviation of a log-normal factor of this log-variance, at most MOST_RELATIVE."""
    return math.sqrt(math.expm1(min(log_variance, math.log1p(MOST_RELATIVE**2))))
