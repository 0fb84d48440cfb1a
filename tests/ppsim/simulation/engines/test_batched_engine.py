"""The batched engine: each sample to the last bit as the other engines have it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Conditions, Network, StageCost, build_schedule
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.simulation.engines.batched_engine import run_batched
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.timed_program import TimedProgram
from tests.support.strategies import networks, schedules, stage_costs


@pytest.mark.parametrize("engine", ["compiled", "simpy"])
@given(data=st.data())
def test_every_sample_is_what_the_engine_says_of_it_alone(engine: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    program = schedule.program
    network = data.draw(networks(schedule.ranks))
    window = data.draw(st.none() | st.integers(0, 2))
    if window is not None:
        window += max(smallest_receive_window(program), 1)
    costs = data.draw(stage_costs(schedule.stages))
    conditions = Conditions(send_s=data.draw(st.sampled_from([0.0, 0.3])), receive_window=window)
    timed = TimedProgram.of(program, costs, network, conditions)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(1, 4))
    duration_s = generator.random((count, len(program.stage)))
    journeys = count if data.draw(st.booleans()) else 1
    occupied_s, latency_s = generator.random((2, journeys, len(program.messages)))
    watched = generator.integers(len(program.stage), size=3)
    dispatch_s = generator.random((count if data.draw(st.booleans()) else 1, program.actions))
    found = run_batched(timed, duration_s, dispatch_s, occupied_s, latency_s, watched=watched, with_starts=True)
    for index in range(count):
        which = min(index, journeys - 1)
        alone = replace(
            timed,
            duration_s=duration_s[index],
            dispatch_s=dispatch_s[min(index, len(dispatch_s) - 1)],
            occupied_s=occupied_s[which],
            latency_s=latency_s[which],
        )
        times = run_engine(engine, alone)
        assert found.start_s[index].tolist() == times.start_s.tolist()
        assert found.watched_end_s[index].tolist() == times.end_s[watched].tolist()
        assert found.makespan_s[index] == times.end_s.max() - times.start_s.min()
        assert found.step_start_s[index] == times.start_s.min()
        taken_s = np.bincount(program.rank, times.end_s - times.start_s, program.ranks)
        assert found.compute_s[index].tolist() == taken_s.tolist()
        for rank in range(program.ranks):
            rows = program.rows_of(rank)
            first_s = times.start_s[rows].min() if len(rows) else times.start_s.min()
            last_s = times.end_s[rows].max() if len(rows) else times.start_s.min()
            assert (found.first_start_s[index, rank], found.last_end_s[index, rank]) == (first_s, last_s)


def test_starts_are_kept_only_if_asked_for() -> None:
    program = build_schedule("afab", ranks=2, microbatches=3).program
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    timed = TimedProgram.of(program, [cost] * 2, Network())
    none = np.zeros(0, np.int64)
    found = run_batched(
        timed,
        np.tile(timed.duration_s, (4, 1)),
        timed.dispatch_s[None],
        timed.occupied_s[None],
        timed.latency_s[None],
        watched=none,
    )
    assert found.start_s.shape == (0, 12)
    assert found.watched_end_s.shape == (4, 0)
    assert found.makespan_s.tolist() == [12.0] * 4


def test_shared_devices_are_refused() -> None:
    program = build_schedule("afab", ranks=2, microbatches=3).program
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    timed = TimedProgram.of(program, [cost] * 2, Network(), Conditions(cores=1))
    with pytest.raises(ValueError, match="use engine='simpy'"):
        run_batched(
            timed,
            timed.duration_s[None],
            timed.dispatch_s[None],
            timed.occupied_s[None],
            timed.latency_s[None],
            watched=np.zeros(0, np.int64),
        )
