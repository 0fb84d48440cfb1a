"""Step fit: what the length of whole known steps shows of a machine, beyond the gaps between their actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

import ppsim
from ppexec.calibrate.calibration import Calibration, Step, by_known_run, fit
from ppexec.calibrate.known_run import KnownRun
from ppexec.machine.environment import usable_cores
from ppsim import Trace
from ppsim.trace.trace import known

_SAMPLES = 100
_HALVINGS = 10
_MOST_LOST = 0.9
_QUARTILES = 1.349  # between those of the standard normal distribution


def calibrated(known_steps: Sequence[tuple[Trace, KnownRun]]) -> Calibration:
    """Fit a whole calibration to measured steps of known runs.

    Parameters
    ----------
    known_steps : sequence of (Trace, KnownRun)
        Steps whose actions kept cores busy give the `sharing_efficiency`. Those whose actions waited give the rest.
    """
    waiting, busy = (
        [(trace, each.stages) for trace, each in known_steps if each.is_busy == is_busy] for is_busy in (False, True)
    )
    return with_sharing(with_step_variation(fit(waiting), waiting), busy, cores=usable_cores())


def with_step_variation(calibration: Calibration, steps: Sequence[Step]) -> Calibration:
    """Fit `independent_share` and `step_std` to whole steps.

    Parameters
    ----------
    calibration : Calibration
        With all that is fitted to single actions.
    steps : sequence of (Trace, stage costs)
        Of known runs that waited.

    Returns
    -------
    Calibration
        Its samples have the median length and the deviation of these steps.

    Notes
    -----
    Where ranks wait for each other, the latest one counts. So variation costs more than its mean, and most if it is
    independent for each rank. But what makes one rank late (another program on its core, a pause of the machine) often
    makes all ranks late. Only whole steps show the share of each.
    """

    def median_s(level: float, step: Step) -> float:
        return float(np.median(_samples_s(replace(calibration, independent_share=level), step)))

    found = replace(calibration, independent_share=_bisect(steps, 0.0, 1.0, median_s))
    unexplained = [
        _deviation([trace.makespan_s for trace, _ in same]) ** 2 - _deviation(_samples_s(found, same[0])) ** 2
        for same in by_known_run(steps)
    ]
    return replace(found, step_std=max(float(np.mean(unexplained)), 0.0) ** 0.5)


def _samples_s(calibration: Calibration, step: Step) -> npt.NDArray[np.float64]:
    trace, stages = step
    return ppsim.monte_carlo(
        trace.program.schedule,
        stages,
        jitter=calibration.jitter(timed=True),
        samples=_SAMPLES,
        **calibration.options(trace.program, known(trace.message_bytes)),
    ).makespan_s


def _deviation(seconds: npt.ArrayLike) -> float:
    """The relative standard deviation, from the quartiles as if normal, since disturbed steps are outliers."""
    return float(np.subtract(*np.quantile(np.log(seconds), [0.75, 0.25]))) / _QUARTILES


def with_sharing(calibration: Calibration, steps: Sequence[Step], *, cores: int) -> Calibration:
    """Fit the `sharing_efficiency` with which `ppsim.simulate` predicts the length of these steps.

    Parameters
    ----------
    calibration : Calibration
        With all else.
    steps : sequence of (Trace, stage costs)
        Of known runs whose actions kept a core busy for their CPU time. Without any the efficiency is 1.
    cores : int
        Cores of this machine.

    Notes
    -----
    The efficiency covers idle cores while ranks queue for another core, switching between ranks, and the cores that
    other replicas take. What caches lose is in the CPU time of the actions.
    """

    def step_s(lost: float, step: Step) -> float:
        trace, stages = step
        return ppsim.simulate(
            trace.program.schedule,
            stages,
            cores=cores,
            sharing="fair",
            sharing_efficiency=1 - lost,
            **calibration.options(trace.program, known(trace.message_bytes)),
        ).makespan_s

    return replace(calibration, sharing_efficiency=1 - _bisect(steps, 0.0, _MOST_LOST, step_s) if steps else 1.0)


def _bisect(steps: Sequence[Step], low: float, high: float, predict: Callable[[float, Step], float]) -> float:
    """Bisect the level at which the geometric mean of predicted / measured step time is 1.

    Predictions grow with the level. Each known run counts once, with the median of its steps. Where no level between
    `low` and `high` fits, the nearer end is returned.
    """
    taken = [(same[0], float(np.median([trace.makespan_s for trace, _ in same]))) for same in by_known_run(steps)]
    measured = np.log([measured_s for _, measured_s in taken])

    def is_too_long(level: float) -> bool:
        return bool(np.mean(np.log([predict(level, step) for step, _ in taken]) - measured) > 0)

    if is_too_long(low):
        return low
    if not is_too_long(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_too_long(middle) else (middle, high)
    return (low + high) / 2
