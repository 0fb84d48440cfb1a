"""Attribution: the parts add up on every trace, and each names what was put there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given

from ppsim import Link, Network, Schedule, StageCost, Trace, attribute, build_schedule, simulate
from ppsim.explain.step_graph import StepGraph, replay
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.timed_program import TimedProgram
from tests.support.traces import COST, B, F, check_sums, check_waits, measured, simulated

SIZES = [(1, 1), (2, 2), (2, 5), (3, 3), (4, 4), (4, 9), (5, 8)]


@given(simulated())
def test_parts_add_up_to_the_bubble_of_a_simulated_step(trace: Trace) -> None:
    check_sums(trace)
    assert (attribute(trace).device_s <= 1e-12 * trace.makespan_s).all()


@given(measured())
def test_parts_add_up_to_the_bubble_of_a_measured_step_whatever_its_clocks(trace: Trace) -> None:
    check_sums(trace)


@given(simulated() | measured())
def test_replaying_a_traces_delays_gives_its_times(trace: Trace) -> None:
    graph = StepGraph.of(trace)
    again = replay(graph.wiring, graph.edge_times)
    close = 1e-12 * max(1.0, trace.makespan_s, float(np.abs(np.array(graph.times.arrival_s)).max(initial=0.0)))
    for name in ("start_s", "end_s", "left_s", "arrival_s"):
        assert getattr(again, name) == pytest.approx(getattr(graph.times, name), abs=close)


@given(simulated())
def test_waits_are_what_is_seen_at_each_moment(trace: Trace) -> None:
    check_waits(trace)


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
@pytest.mark.parametrize("latency_s", [0.0, 0.5])
def test_afab_with_equal_stages_only_fills_drains_and_sends(ranks: int, microbatches: int, latency_s: float) -> None:
    """Each rank waits from its last forward to its first backward for the ranks after it, there and back."""
    schedule = build_schedule("afab", ranks=ranks, microbatches=microbatches)
    found = attribute(simulate(schedule, [COST] * ranks, network=Network(latency_s=latency_s)))
    before, behind = np.arange(ranks), ranks - 1 - np.arange(ranks)
    assert found.warm_up_s == pytest.approx(before * (F + latency_s) + behind * (F + B))
    assert found.drain_s == pytest.approx(before * (B + latency_s))
    assert found.messages_s == pytest.approx(behind * 2 * latency_s)
    assert found.warm_up_of_s["messages"] == pytest.approx(before * latency_s)
    assert found.drain_of_s["compute"] == pytest.approx(before * B)
    for name in ("imbalance", "device", "straggler"):
        assert not found.parts_s[name].any()


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_1f1b_with_equal_stages_only_fills_and_drains(ranks: int, microbatches: int) -> None:
    schedule = build_schedule("1f1b", ranks=ranks, microbatches=microbatches)
    found = attribute(simulate(schedule, [COST] * ranks))
    before, behind = np.arange(ranks), ranks - 1 - np.arange(ranks)
    assert found.warm_up_s == pytest.approx(before * F + behind * B)
    assert found.drain_s == pytest.approx(before * B + behind * F)
    assert sum(part.sum() for name, part in found.parts_s.items() if name not in ("warm_up", "drain")) == 0


def slowed(factor: float, stage: int, ranks: int = 4) -> list[StageCost]:
    slow = StageCost(forward_s=F * factor, backward_input_s=2 * factor, backward_weight_s=3 * factor, output_bytes=8)
    return [slow if at == stage else COST for at in range(ranks)]


@pytest.mark.parametrize("name", ["afab", "1f1b"])
def test_a_slow_rank_is_imbalance_unless_it_was_expected_to_be_fast(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    trace = simulate(schedule, slowed(2.0, stage=1))
    by_itself, against_plan = attribute(trace), attribute(trace, expected=[COST] * 4)
    assert by_itself.imbalance_s[2:].min() > 0
    assert not by_itself.straggler_s.any()
    assert against_plan.straggler_s[[0, 2, 3]].min() > 0
    assert against_plan.straggler_s[1] == 0  # the slow rank waits for nobody
    assert not against_plan.imbalance_s.any()


def with_duration(trace: Trace, costs: list[StageCost], row: int, factor: float) -> Trace:
    """The step with free messages and one row `factor` times as long."""
    timed = TimedProgram.of(trace.program, costs, Network())
    durations = timed.duration_s.copy()
    durations[row] *= factor
    times = run_engine("simpy", dataclasses.replace(timed, duration_s=durations))
    names = [each.name for each in dataclasses.fields(times) if each.name in vars(trace)]
    return dataclasses.replace(trace, **{name: getattr(times, name) for name in names})


def test_one_long_action_is_a_straggler_to_the_ranks_behind_it() -> None:
    """1F3 takes 12 s longer; rank 2 has nothing else to do, and rank 3 waits for rank 2."""
    schedule = build_schedule("afab", ranks=4, microbatches=8)
    trace = simulate(schedule, [COST] * 4)
    row = next(row for row in trace.program.rows_of(1) if str(trace.program.action_of(row)) == "1F3")
    found = attribute(with_duration(trace, [COST] * 4, row, 5.0))
    assert found.straggler_s.tolist() == [4 * F, 0, 4 * F, 4 * F]
    assert not found.imbalance_s.any()


@pytest.mark.parametrize("name", ["afab", "1f1b", "interleaved-1f1b"])
def test_a_slow_link_is_message_time(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    costs = [COST] * schedule.stages
    slow = Network(links={(1, 2): Link(bytes_per_s=1.0)})  # 8 s a message, longer than F
    free, found = attribute(simulate(schedule, costs)), attribute(simulate(schedule, costs, network=slow))
    assert found.messages_s.sum() > 0.5 * (found.bubble_s - free.bubble_s).sum()
    assert found.imbalance_s.sum() <= free.imbalance_s.sum() + 1e-9


def test_waiting_with_everything_there_is_a_devices() -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=3)
    trace = simulate(schedule, [COST] * 2)
    row = trace.program.rows_of(1)[-1]
    start, end = trace.start_s.copy(), trace.end_s.copy()
    start[row] += 2.0
    end[row] += 2.0
    late = dataclasses.replace(trace, start_s=start, end_s=end)
    assert attribute(late).device_s[1] == 2.0
    assert attribute(trace).device_s[1] == 0.0


def test_a_message_that_was_there_before_its_receiver_looked_is_not_waited_for() -> None:
    """A run sees an arrival when it looks; the time from the action before to that look is the executor's own."""
    schedule = build_schedule("afab", ranks=2, microbatches=4)
    trace = simulate(schedule, [COST, slowed(2.0, stage=0)[0]], network=Network(latency_s=0.25))
    program = trace.program
    late = 0.01 * (np.arange(len(trace.start_s)) - np.array([program.rows_of(r)[0] for r in program.rank]))
    start, end = trace.start_s + late, trace.end_s + late
    consumer, producer = program.messages.consumer, program.messages.producer
    sent = end[producer]
    seen = start[consumer]
    run = dataclasses.replace(
        trace,
        clock="measured",
        start_s=start,
        end_s=end,
        message_start_s=sent,
        message_left_s=seen,
        message_arrival_s=seen,
    )
    found = attribute(run)
    assert found.device_s[1] == pytest.approx(7 * 0.01)  # rank 1 is the slow one and never waits
    assert found.messages_s[1] == pytest.approx(0, abs=1e-9)


def test_a_rank_without_actions_drains_and_a_step_without_length_has_no_parts() -> None:
    trace = simulate(Schedule.of([["0F0", "0B0"], [], ["1F0", "1B0"]]), [COST] * 2)
    found = attribute(trace)
    assert found.drain_s[1] == trace.makespan_s
    nothing = simulate(trace.schedule, [StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)] * 2)
    assert not any(part.any() for part in attribute(nothing).parts_s.values())
    assert sum(attribute(nothing).fractions.values()) == 0
    assert "no time" in str(attribute(nothing))


def test_frame_dictionary_and_text_say_the_same() -> None:
    found = attribute(simulate(build_schedule("1f1b", ranks=3, microbatches=4), [COST] * 3))
    frame = found.to_frame()
    assert frame["warm_up_s"].tolist() == found.warm_up_s.tolist() == found.to_dict()["warm_up_s"]
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found).splitlines()[-1].startswith("critical path: ")


def test_refusals_name_the_rank_or_action() -> None:
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [COST] * 2)
    with pytest.raises(ValueError, match="3 expected costs for a schedule of 2 stages"):
        attribute(trace, expected=[COST] * 3)
    with pytest.raises(ValueError, match="0F0 ends at"):
        attribute(dataclasses.replace(trace, end_s=trace.end_s - 10 * (np.arange(8) == 0)))
    with pytest.raises(ValueError, match="rank 0 computes for"):
        attribute(dataclasses.replace(trace, start_s=trace.start_s * 0, end_s=trace.end_s))
    with pytest.raises(ValueError, match="message_arrival_s holds"):
        attribute(dataclasses.replace(trace, message_arrival_s=trace.message_arrival_s * np.nan))
