"""Whole steps: what the length of known runs says of a machine that the gaps between their actions do not."""

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

_SAMPLES = 100
_HALVINGS = 10
_MOST_LOST = 0.9
_QUARTILES = 1.349  # between those of the standard normal distribution


def calibrated(known_steps: Sequence[tuple[Trace, KnownRun]]) -> Calibration:
    """What measured steps of known runs say: of sharing cores those that kept them busy, of all else the others."""
    calm, busy = (
        [(trace, each.stages) for trace, each in known_steps if each.is_busy == is_busy] for is_busy in (False, True)
    )
    return with_sharing(with_independence(fit(calm), calm), busy, cores=usable_cores())


def with_independence(calibration: Calibration, steps: Sequence[Step]) -> Calibration:
    """The calibration with `independence` and `common`, whose samples are as long, and vary as much, as these steps.

    steps: of known runs that waited. Where ranks wait for one another, the latest counts, so what varies costs more
    than its mean, and most if it varies for each rank alone. But what makes one rank late, another's work on the same
    core or a machine that pauses, often makes all late. How much of either there is shows only in whole steps.
    """

    def median_s(level: float, step: Step) -> float:
        return float(np.median(_samples_s(replace(calibration, independence=level), step)))

    found = replace(calibration, independence=_level(steps, 0.0, 1.0, median_s))
    unexplained = [
        _deviation([trace.makespan_s for trace, _ in same]) ** 2 - _deviation(_samples_s(found, same[0])) ** 2
        for same in by_known_run(steps)
    ]
    return replace(found, common=max(float(np.mean(unexplained)), 0.0) ** 0.5)


def _samples_s(calibration: Calibration, step: Step) -> npt.NDArray[np.float64]:
    trace, stages = step
    return ppsim.monte_carlo(
        trace.program.schedule,
        stages,
        jitter=calibration.jitter(timed=True),
        samples=_SAMPLES,
        **calibration.options(trace.program, trace.message_bytes),
    ).makespan_s


def _deviation(seconds: npt.ArrayLike) -> float:
    """Relative, from the quartiles as if normal: steps that others disturbed are far out."""
    return float(np.subtract(*np.quantile(np.log(seconds), [0.75, 0.25]))) / _QUARTILES


def with_sharing(calibration: Calibration, steps: Sequence[Step], *, cores: int) -> Calibration:
    """The calibration with the `sharing_efficiency` that lets `simulate` say of these steps what they took.

    steps: of known runs whose actions kept a core at work for their CPU time; without any the efficiency is 1. So it
    holds what cores stand idle for while ranks queue for another one, and switching, with actions as long as these, and
    what other replicas take of the cores; what caches lose is in the CPU time of the actions themselves.
    """

    def step_s(lost: float, step: Step) -> float:
        trace, stages = step
        return ppsim.simulate(
            trace.program.schedule,
            stages,
            cores=cores,
            sharing="fair",
            sharing_efficiency=1 - lost,
            **calibration.options(trace.program, trace.message_bytes),
        ).makespan_s

    return replace(calibration, sharing_efficiency=1 - _level(steps, 0.0, _MOST_LOST, step_s) if steps else 1.0)


def _level(steps: Sequence[Step], low: float, high: float, predict: Callable[[float, Step], float]) -> float:
    """Where predictions, longer the higher the level, are as long as the steps, in the mean of the ratios' logarithms.

    Of the steps of one known run the median counts. Either end, if nothing between them is long or short enough.
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
