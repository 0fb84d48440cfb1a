"""Jitter fit: the components that made traces are found in them again. Seeds are fixed; bounds are five deviations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ppsim import Jitter, Schedule, StageCost, Trace, build_schedule, monte_carlo, simulate

STEPS, RANKS, MICROBATCHES = 400, 4, 6


def traces(jitter: Jitter, *, ranks: int = RANKS, steps: int = STEPS, seed: int = 0) -> list[Trace]:
    """Steps in which every stage has other costs."""
    schedule = build_schedule("1f1b", ranks=ranks, microbatches=MICROBATCHES)
    costs = [StageCost(forward_s=1 + s, backward_input_s=2 + s, backward_weight_s=1) for s in range(ranks)]
    ensemble = monte_carlo(schedule, costs, jitter=jitter, samples=steps, seed=seed)
    return [ensemble.trace(sample) for sample in range(steps)]


def test_components_are_told_apart() -> None:
    made = Jitter(action=0.08, rank=0.05, step=0.04)
    found = Jitter.from_traces(traces(made))
    per_rank = 2 * MICROBATCHES
    assert found.action == pytest.approx(0.08, rel=5 / math.sqrt(2 * STEPS * RANKS * (per_rank - 1)))
    # The mean of a rank's actions is taken for its factor, so its variance has the actions' in it.
    within = 1 + 0.08**2 / per_rank / 0.05**2
    assert found.rank == pytest.approx(0.05, rel=5 * within / math.sqrt(2 * STEPS * (RANKS - 1)))
    across = 1 + 0.05**2 * within / RANKS / 0.04**2
    assert found.step == pytest.approx(0.04, rel=5 * across / math.sqrt(2 * STEPS))


@pytest.mark.parametrize("kind", ["action", "rank", "step"])
def test_what_does_not_vary_is_not_found(kind: str) -> None:
    found = Jitter.from_traces(traces(Jitter(**{kind: 0.1})))
    assert getattr(found, kind) == pytest.approx(0.1, rel=0.18)  # five deviations of the step's, the widest
    for other in {"action", "rank", "step"} - {kind}:
        # Five deviations of a step's variance where ranks vary, 0.1^2 / p sqrt(2 / N); the others are narrower.
        assert getattr(found, other) < math.sqrt(5 * 0.1**2 / RANKS * math.sqrt(2 / STEPS))
    assert found.message == found.hiccup_probability == 0


def test_a_single_ranks_jitter_is_the_steps() -> None:
    found = Jitter.from_traces(traces(Jitter(action=0.05, rank=0.1), ranks=1))
    assert found.rank == 0
    assert found.step == pytest.approx(0.1, rel=0.18)


def test_hiccups_are_among_the_factors_of_their_kind() -> None:
    steps = traces(Jitter(action=0.01))
    program = steps[0].program
    struck = int(program.rows_of(2)[3])  # a forward
    durations_s = steps[7].end_s - steps[7].start_s
    late = replace(
        steps[7], end_s=steps[7].start_s + durations_s * np.where(np.arange(len(durations_s)) == struck, 9, 1)
    )
    found = Jitter.from_traces([*steps[:7], late, *steps[8:]])
    assert program.action_of(struck).kind.name == "F"
    assert found.factors["F"].max() > 5
    assert found.factors["B"].max() < 1.5
    for drawn in found.factors.values():
        assert drawn.mean() == pytest.approx(1)
    assert len(found.factors["F"]) == STEPS * RANKS * MICROBATCHES


def test_what_was_fitted_makes_steps_like_those_it_was_fitted_to() -> None:
    made = Jitter(action=0.1, rank=0.05, step=0.03)
    steps = traces(made)
    found = Jitter.from_traces(steps)
    costs = [StageCost(forward_s=1 + s, backward_input_s=2 + s, backward_weight_s=1) for s in range(RANKS)]
    again = monte_carlo(steps[0].schedule, costs, jitter=found, samples=4000, seed=1)
    measured_s = np.array([trace.makespan_s for trace in steps])
    error_s = math.hypot(measured_s.std() / math.sqrt(STEPS), again.standard_error_s)
    assert again.mean_s == pytest.approx(measured_s.mean(), abs=5 * error_s)
    assert again.std_s == pytest.approx(measured_s.std(), rel=5 / math.sqrt(2 * STEPS))


def test_traces_that_say_nothing_are_refused() -> None:
    step = traces(Jitter(), steps=2)[0]
    with pytest.raises(ValueError, match="give two traces or more, got 1"):
        Jitter.from_traces([step])
    with pytest.raises(ValueError, match="of different programs"):
        Jitter.from_traces([step, traces(Jitter(), ranks=2, steps=1)[0]])
    nothing = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    empty = simulate(Schedule.of([["0F0", "0B0"]]), [nothing])
    with pytest.raises(ValueError, match="no action takes time"):
        Jitter.from_traces([empty, empty])
    assert Jitter.from_traces([step, step]).is_calm
