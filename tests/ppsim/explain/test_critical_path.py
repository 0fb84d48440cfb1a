"""The critical path: it tiles the step, and nothing on it can be late."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Network, StageCost, Trace, attribute, build_schedule, critical_path, simulate
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.timed_program import TimedProgram
from tests.support import strategies
from tests.support.traces import measured, simulated


@given(simulated() | measured())
def test_segments_tile_the_step(trace: Trace) -> None:
    path = critical_path(trace)
    assert path.segments[0].start_s == 0
    assert path.segments[-1].end_s == trace.makespan_s
    for one, following in zip(path.segments[:-1], path.segments[1:], strict=True):
        assert one.end_s == following.start_s
        assert one.start_s <= one.end_s
    assert sum(path.by_what_s.values()) == pytest.approx(trace.makespan_s)
    assert len(path.to_frame()) == len(path.segments)


@given(simulated())
def test_a_simulated_path_is_made_of_what_the_model_has(trace: Trace) -> None:
    path = critical_path(trace)
    assert path.by_what_s["device"] == path.by_what_s["posting"] == 0
    for segment in path.segments:
        if segment.what == "compute":
            assert (segment.start_s, segment.end_s) == (trace.start_s[segment.row], trace.end_s[segment.row])
    assert not attribute(trace).slack_s[path.rows].any()


@given(st.data())
def test_slack_is_by_how_much_an_action_can_be_longer(data: st.DataObject) -> None:
    schedule = data.draw(strategies.schedules())
    costs = data.draw(strategies.stage_costs(schedule.stages))
    network = data.draw(strategies.networks(schedule.ranks))
    trace = simulate(schedule, costs, network=network)
    slack = attribute(trace).slack_s
    row = data.draw(st.integers(0, len(slack) - 1))

    def makespan_with(longer_s: float) -> float:
        timed = TimedProgram.of(trace.program, costs, network)
        durations = timed.duration_s.copy()
        durations[row] += longer_s
        times = run_engine("simpy", dataclasses.replace(timed, duration_s=durations))
        return float(times.end_s.max())

    # Numbers are multiples of powers of two, so these hold to the last bit.
    assert makespan_with(slack[row]) == trace.makespan_s
    assert makespan_with(slack[row] / 2) == trace.makespan_s
    assert makespan_with(slack[row] + 0.25) == trace.makespan_s + 0.25


def test_the_path_of_1f1b_in_words() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=4)
    schedule = build_schedule("1f1b", ranks=2, microbatches=1)
    path = critical_path(simulate(schedule, [cost] * 2, network=Network(latency_s=0.5, bytes_per_s=8)))
    assert [path.label(segment) for segment in path.segments] == [
        "0F0 on rank 0",
        "transfer of 0F0 from rank 0 to 1",
        "latency of 0F0 from rank 0 to 1",
        "1F0 on rank 1",
        "1B0 on rank 1",
        "transfer of 1B0 from rank 1 to 0",
        "latency of 1B0 from rank 1 to 0",
        "0B0 on rank 0",
    ]
    assert {what: seconds for what, seconds in path.by_what_s.items() if seconds} == {
        "compute": 6,
        "transfer": 1,
        "latency": 1,
    }


def test_a_message_that_queues_was_kept_by_the_ones_ahead() -> None:
    """Four forwards of 1 s on a link that takes 10 s a message: after the first all is transfer."""
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=10)
    schedule = build_schedule("afab", ranks=2, microbatches=4).forward_only()
    path = critical_path(simulate(schedule, [cost] * 2, network=Network(bytes_per_s=1)))
    assert [segment.what for segment in path.segments] == ["compute"] + ["transfer"] * 4 + ["compute"]
    assert path.length_s == 42


def test_a_late_start_is_a_device_segment() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    trace = simulate(build_schedule("afab", ranks=1, microbatches=2), [cost])
    late = np.array([0.0, 0.5, 0.5, 0.5])
    run = dataclasses.replace(trace, clock="measured", start_s=trace.start_s + late, end_s=trace.end_s + late)
    path = critical_path(run)
    assert path.by_what_s["device"] == 0.5
    assert path.label(path.segments[1]) == "wait for the device before 0F1 on rank 0"
