"""Whole steps: what their length hides is found again from steps that were made with it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

import ppsim
from ppexec.calibrate.calibration import Calibration, Step, fit
from ppexec.calibrate.known_run import KnownRun, known_runs
from ppexec.calibrate.step_fit import calibrated, with_sharing, with_step_variation
from ppexec.stage.timed import burn_s
from ppsim import Trace

LATE_S = np.array([0.0] * 9 + [2e-3])
VARYING = Calibration(action_s=1e-4, one_way_s={64: 2e-4}, receive_s={64: 0.0}, send_s={64: 0.0}, late_s=LATE_S)


def made(each: KnownRun, calibration: Calibration, count: int, **sharing: float | str) -> list[Trace]:
    """Steps as this calibration has them, each a sample."""
    options = calibration.options(each.schedule.program, np.full(len(each.schedule.program.messages), each.size_bytes))
    found = ppsim.monte_carlo(
        each.schedule, each.stages, jitter=calibration.jitter(timed=True), samples=count, seed=7, **options, **sharing
    )
    return [found.trace(sample) for sample in range(count)]


def steps_of(calibration: Calibration, *, ranks: int = 4) -> list[Step]:
    return [
        (trace, each.stages) for each in known_runs(ranks, [64], 5e-3) for trace in made(each, calibration, count=60)
    ]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_how_much_varies_for_each_rank_alone_is_found(share: float) -> None:
    """Late for a tenth of all actions, by 2 ms or by the mean of that."""
    steps = steps_of(replace(VARYING, independent_share=share))
    assert with_step_variation(VARYING, steps).independent_share == pytest.approx(share, abs=0.1)


def test_ranks_that_are_late_alone_make_a_longer_step_than_the_mean_of_it() -> None:
    """Else there would be nothing to find."""
    first = known_runs(4, [64], 5e-3)[0]
    alone, alike = (made(first, replace(VARYING, independent_share=level), count=60) for level in (1.0, 0.0))
    assert np.median([trace.makespan_s for trace in alone]) > 1.01 * alike[0].makespan_s


def test_what_steps_vary_by_together_is_found() -> None:
    calm = replace(VARYING, late_s=np.zeros(1))
    steps = steps_of(replace(calm, step_std=0.03))
    found = with_step_variation(calm, steps)
    assert found.step_std == pytest.approx(0.03, rel=0.3)
    assert with_step_variation(calm, steps_of(calm)).step_std == 0.0


def test_a_step_shorter_than_all_that_is_known_has_nothing_independent() -> None:
    steps = steps_of(replace(VARYING, late_s=np.zeros(1)))
    assert with_step_variation(VARYING, steps).independent_share == 0.0


@pytest.mark.parametrize("efficiency", [1.0, 0.9, 0.6])
def test_what_sharing_cores_loses_is_found(efficiency: float) -> None:
    calm = replace(VARYING, late_s=np.zeros(1))
    steps = [
        (trace, each.stages)
        for each in known_runs(4, [64], 5e-3)
        for trace in made(each, calm, count=2, cores=2, sharing="fair", sharing_efficiency=efficiency)
    ]
    assert with_sharing(calm, steps, cores=2).sharing_efficiency == pytest.approx(efficiency, abs=2e-3)


def test_without_busy_known_runs_nothing_is_lost() -> None:
    assert with_sharing(VARYING, [], cores=2).sharing_efficiency == 1.0


def test_busy_known_runs_say_nothing_of_dispatch() -> None:
    """Their actions take long because cores are shared, which is no cost of running a schedule."""
    calm, busy = known_runs(2, [64], 5e-3, with_busy=True)[:2]
    assert (calm.is_busy, busy.is_busy) == (False, True)
    quiet = made(calm, VARYING, count=4)
    alone = calibrated([(trace, calm) for trace in quiet])
    both = calibrated(
        [(trace, calm) for trace in quiet]
        + [(trace, busy) for trace in made(busy, replace(VARYING, action_s=5e-3), count=4)]
    )
    assert both.action_s == alone.action_s == fit([(trace, calm.stages) for trace in quiet]).action_s


def test_burning_takes_a_threads_own_time() -> None:
    began_ns = time.thread_time_ns()
    burn_s(0.01)
    assert time.thread_time_ns() - began_ns >= 10_000_000
