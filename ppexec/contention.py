"""Contention: what ranks that outnumber the cores lose to the scheduler, as found in exercises that kept cores busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

import ppsim
from ppexec.calibrate import Calibration, Step, by_exercise, fit
from ppexec.environment import usable_cores
from ppexec.exercise import Exercise
from ppsim import Trace

_LEAST = 0.1
_HALVINGS = 10


def calibrated(exercised: Sequence[tuple[Trace, Exercise]]) -> Calibration:
    """What measured steps of exercises say; of the sharing of cores those that kept them busy, else those that waited."""
    calm, busy = ([(trace, each.stages) for trace, each in exercised if each.is_busy == is_busy] for is_busy in (0, 1))
    return with_sharing(fit(calm), busy, cores=usable_cores())


def with_sharing(calibration: Calibration, steps: Sequence[Step], *, cores: int) -> Calibration:
    """The calibration with the `sharing_efficiency` that lets `simulate` say of these steps what they took.

    steps: of exercises whose actions kept a core at work for their CPU time, each with what its stages were to take. Of
    those of one exercise the median counts, of all exercises the mean of the errors' logarithms is made nothing; the
    efficiency is 1 where they took no longer than on cores that lose nothing, and without any. So it holds what cores
    stand idle for while ranks queue for another one, and switching, with actions as long as these; what caches lose is
    in the CPU time of the actions themselves.
    """
    taken = [(same[0], float(np.median([trace.makespan_s for trace, _ in same]))) for same in by_exercise(steps)]

    def is_too_long(efficiency: float) -> bool:
        predicted_s = [_predict(step, calibration, cores, efficiency) for step, _ in taken]
        return bool(np.mean(np.log(predicted_s) - np.log([measured_s for _, measured_s in taken])) > 0)

    if not taken or is_too_long(1.0):
        return replace(calibration, sharing_efficiency=1.0)
    low, high = _LEAST, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_long(middle) else (low, middle)
    return replace(calibration, sharing_efficiency=(low + high) / 2)


def _predict(step: Step, calibration: Calibration, cores: int, efficiency: float) -> float:
    trace, stages = step
    return ppsim.simulate(
        trace.program.schedule,
        stages,
        cores=cores,
        sharing="fair",
        sharing_efficiency=efficiency,
        **calibration.options(trace.program, trace.message_bytes),
    ).makespan_s
