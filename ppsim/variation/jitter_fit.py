"""Jitter fit: which part of the variation between measured steps is the actions', the ranks' and the whole step's.

The model: the logarithm of what action a of rank r takes in step n is mean_a + S_n + R_nr + A_na, with independent
step, rank and action terms. The mean of each action over the steps is taken out, so that stages, kinds and microbatches
may differ. What remains is a nested analysis of variance (Searle, Casella, McCulloch, Variance Components, 1992,
section 3.6; here with unweighted means, since ranks may have different numbers of actions k_r), N steps, p ranks:

    A: the sum of squares around each rank's mean in each step, over (N - 1) (sum of (k_r - 1))
    R: the sum of squares of those means around the step's mean, over (N - 1) (p - 1), less A (sum of 1 / k_r) / p
    S: the sum of squares of the steps' means, over N - 1, less R / p and A (sum of 1 / k_r) / p^2

A negative difference counts as 0. The jitter of a single rank cannot be told from the step's: all of it is the step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.trace.trace import Trace
from ppsim.variation.log_normal import relative_deviation


class FittedJitter(NamedTuple):
    """Fields of `Jitter`: relative standard deviations, and measured factors of single actions by kind."""

    action: float
    rank: float
    step: float
    factors: dict[str, npt.NDArray[np.float64]]


def fit_jitter(traces: Sequence[Trace]) -> FittedJitter:
    """Fit the jitter between steps of one program.

    Parameters
    ----------
    traces : sequence of Trace
        Two or more steps.

    Returns
    -------
    FittedJitter
        Factors of single actions are the measured ones, with their hiccups: the remainders A_na, scaled to their
        variance before means were taken out, and to mean 1. Ranks and steps have log-normal factors.

    Raises
    ------
    InputError
        For fewer than two traces, traces of different programs, or actions without length.

    Notes
    -----
    Messages are left out: what a message takes in a measured trace is mostly its receiver's time.
    """
    if len(traces) < 2:
        raise InputError(f"jitter shows between steps: give two traces or more, got {len(traces)}")
    program = traces[0].program
    for trace in traces[1:]:
        same = trace.program is program or all(
            np.array_equal(getattr(trace.program, name), getattr(program, name))
            for name in ("rank", "stage", "kind", "microbatch", "action_start")
        )
        if not same:
            raise InputError("the traces are of different programs: give several steps of one")
    seconds = np.array([_action_seconds(trace) for trace in traces])
    used = (seconds > 0).all(axis=0)
    if not used.any():
        raise InputError("no action takes time in every trace: there is no jitter to be found")
    rank, kind = (column[program.action_start[:-1]][used] for column in (program.rank, program.kind))
    return _fitted(np.log(seconds[:, used]), np.unique(rank, return_inverse=True)[1], kind)


def _action_seconds(trace: Trace) -> npt.NDArray[np.float64]:
    """What each action took, shape (actions,); a pair's rows together."""
    program: Program = trace.program
    return trace.end_s[program.action_start[1:] - 1] - trace.start_s[program.action_start[:-1]]


def _fitted(
    logs: npt.NDArray[np.float64], rank: npt.NDArray[np.integer], kind: npt.NDArray[np.integer]
) -> FittedJitter:
    """The analysis of variance. logs: shape (steps, actions). rank: numbers from 0 without gaps."""
    steps, per_rank = len(logs), np.bincount(rank)
    ranks = len(per_rank)
    centred = logs - logs.mean(axis=0)
    rank_means = np.stack([np.bincount(rank, each) / per_rank for each in centred])
    remainders = centred - rank_means[:, rank]
    step_means = rank_means.mean(axis=1)
    degrees, inverse = (steps - 1) * (len(rank) - ranks), float((1 / per_rank).sum())
    of_action = float((remainders**2).sum()) / degrees if degrees else 0.0
    of_rank = 0.0
    if ranks > 1:
        between = float(((rank_means - step_means[:, None]) ** 2).sum()) / ((steps - 1) * (ranks - 1))
        of_rank = max(between - of_action * inverse / ranks, 0.0)
    of_step = float((step_means**2).sum()) / (steps - 1) - of_rank / ranks - of_action * inverse / ranks**2
    return FittedJitter(
        action=relative_deviation(of_action),
        rank=relative_deviation(of_rank),
        step=relative_deviation(max(of_step, 0.0)),
        factors=_factors(remainders, per_rank[rank], kind) if of_action > 0 else {},
    )


def _factors(
    remainders: npt.NDArray[np.float64], on_rank: npt.NDArray[np.integer], kind: npt.NDArray[np.integer]
) -> dict[str, npt.NDArray[np.float64]]:
    """Measured factors of single actions by kind. on_rank: how many actions the rank of each action has."""
    steps = len(remainders)
    kept = on_rank > 1  # an action alone on its rank cannot be told from its rank
    widened = remainders[:, kept] * np.sqrt(steps / (steps - 1) * on_rank[kept] / (on_rank[kept] - 1))
    factors = {}
    for each in np.unique(kind[kept]).tolist():
        drawn = np.exp(widened[:, kind[kept] == each].ravel())
        factors[Kind(each).name] = drawn / drawn.mean()
    return factors
