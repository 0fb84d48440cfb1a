"""Stages whose parameters are all frozen: a backward toward the input, and no W."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, Schedule, StageCost, build_schedule, simulate
from tests.support.evaluator import cells, evaluate, spelled
from tests.support.strategies import communications, schedules


@given(schedules() | schedules().flatmap(communications), st.sets(st.integers(0, 5)))
def test_what_is_left_is_what_spelling_leaves(schedule: Schedule, chosen: set[int]) -> None:
    frozen = sorted(stage for stage in chosen if stage < schedule.stages)
    names = "|".join(map(str, frozen)) or "none"
    with_messages = schedule.communication is not None
    wanted = [
        [re.sub(rf"^({names})I", r"\1B", cell) for cell in row if not re.match(rf"({names})W", cell)]
        for row in cells(schedule.to_csv(messages=with_messages))
    ]
    found = schedule.with_frozen_stages(frozen)
    assert cells(found.to_csv(messages=with_messages)) == wanted
    assert found.stages == schedule.stages


def test_a_frozen_stage_takes_no_time_for_weights() -> None:
    """Adapters on the last stage alone: the others' backwards are toward the input only."""
    trained = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    frozen = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=0)
    costs = [frozen, frozen, trained]
    schedule = build_schedule("zb-h1", ranks=3, microbatches=6).with_frozen_stages([0, 1])
    trace = simulate(schedule, costs)
    assert trace.makespan_s == evaluate(spelled(schedule), schedule.placement, costs).makespan
    assert trace.compute_s.tolist() == [12.0, 12.0, 18.0]


def test_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="stage 3 is not there to be frozen: there are 2"):
        build_schedule("1f1b", ranks=2, microbatches=2).with_frozen_stages([3])
