"""Comparison: contributions add up to the difference, and name what was changed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Link, Network, Schedule, StageCost, Trace, attribute, build_schedule, compare, simulate
from ppsim.explain.change import explain_change
from ppsim.explain.step_graph import StepGraph, on_one_wiring, replay
from tests.support import strategies
from tests.support.traces import measured, simulated

COST = StageCost(
    forward_s=3, backward_input_s=2, backward_weight_s=3, output_bytes=8, activation_bytes=10, weight_activation_bytes=4
)
NETWORK = Network(latency_s=0.5, bytes_per_s=16.0)


@given(simulated() | measured())
def test_a_trace_differs_from_itself_in_nothing(trace: Trace) -> None:
    same = compare(trace, trace)
    assert same.difference_s == 0
    assert not any(each.seconds for each in same.contributions)
    assert not any(seconds.any() for seconds in same.bubbles_s.values())
    assert same.memory == ()
    assert same.largest_rows() == []


@st.composite
def two_steps(draw: st.DrawFn) -> tuple[Trace, Trace]:
    """Two steps of one program: other costs, another network, or as a run might have recorded it."""
    run = draw(measured())
    schedule = run.schedule
    costs, network = draw(strategies.stage_costs(schedule.stages)), draw(strategies.networks(schedule.ranks))
    other = simulate(schedule, costs, network=network)
    if draw(st.booleans()):
        run = simulate(
            schedule,
            draw(strategies.stage_costs(schedule.stages)),
            network=draw(strategies.networks(schedule.ranks)),
        )
    return other, run


@given(two_steps())
def test_contributions_add_up_to_the_difference(steps: tuple[Trace, Trace]) -> None:
    found = compare(*steps)
    size = max(each.makespan_s for each in steps)
    assert math.fsum(each.seconds for each in found.contributions) == pytest.approx(found.difference_s, abs=1e-9 * size)
    assert sum(found.parts_s.values()) == pytest.approx(found.difference_s, abs=1e-9 * size)
    assert abs(found.residual_s) <= 1e-9 * max(size, 1e3)  # clocks that are 1,000 s apart round to that
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found).startswith(found.explain())


@given(two_steps())
def test_the_way_from_one_step_to_the_other_is_integrated_exactly(steps: tuple[Trace, Trace]) -> None:
    """Against the plain definition: at many points of the way, what the critical path says there, averaged."""
    graphs = [StepGraph.of(trace) for trace in steps]
    wiring, (before, after) = graphs[0].wiring, (graph.edge_times for graph in graphs)
    change = explain_change(wiring, before, after)
    shares = (np.arange(400) + 0.5) / 400
    lengths = np.array([max(replay(wiring, before.towards(after, share)).end_s) for share in [0.0, *shares, 1.0]])
    # The length is convex: no chord is below it, and the slopes found are those of its straight pieces.
    total = change.compute_s.sum() + change.device_s.sum() + change.message_s.sum()
    assert total == pytest.approx(lengths[-1] - lengths[0], abs=1e-9 * max(lengths.max(), 1e3))
    assert (np.diff(np.diff(lengths[1:-1])) >= -1e-9 * max(lengths.max(), 1e3)).all()


@st.composite
def two_ways_to_carry(draw: st.DrawFn) -> tuple[Trace, Trace]:
    """Two steps of the same computations on other streams, or with their messages posted elsewhere."""
    schedule = draw(strategies.schedules(least=2))
    network = draw(strategies.networks(schedule.ranks))
    ways = [(schedule, "link")] + [(schedule.with_communication("early"), each) for each in ("link", "pair", "rank")]
    stated = draw(strategies.communications(schedule))
    if stated.program.find_circle() is None:
        ways.append((stated, "link"))
    steps = [
        simulate(way, draw(strategies.stage_costs(schedule.stages)), network=network, streams=streams)
        for way, streams in draw(st.lists(st.sampled_from(ways), min_size=2, max_size=2))
    ]
    return steps[0], steps[1]


@given(two_ways_to_carry())
def test_steps_whose_messages_are_carried_otherwise_are_compared_as_each_is_by_itself(
    steps: tuple[Trace, Trace],
) -> None:
    """Cause of a bug: the second step was read with the first one's wiring, which has other waits and other numbers."""
    found = compare(*steps)
    for each, trace in zip((found.predicted, found.measured), steps, strict=True):
        alone = attribute(trace)
        assert all((each.parts_s[part] == seconds).all() for part, seconds in alone.parts_s.items())
    size = max(each.makespan_s for each in steps)
    assert math.fsum(each.seconds for each in found.contributions) == pytest.approx(found.difference_s, abs=1e-9 * size)
    assert abs(found.residual_s) <= 1e-9 * max(size, 1e3)
    wiring, before, after = on_one_wiring(found.predicted.graph, found.measured.graph)
    for edge_times, trace in ((before, steps[0]), (after, steps[1])):  # the common wiring gives both steps again
        first, last = trace.program.action_start[:-1], trace.program.action_start[1:] - 1
        times, zero_s = replay(wiring, edge_times), trace.start_s.min()
        assert times.start_s == pytest.approx(trace.start_s[first] - zero_s, abs=1e-9 * max(size, 1e3))
        assert times.end_s == pytest.approx(trace.end_s[last] - zero_s, abs=1e-9 * max(size, 1e3))


def test_messages_of_two_steps_are_matched_by_what_they_carry() -> None:
    """One link sends F0 and F1 in either order: message 0 of the one step is message 1 of the other."""
    rows = [["0F0", "0F1", "0SEND_F0", "0SEND_F1"], ["1RECV_F0", "1RECV_F1", "1F0", "1F1"]]
    other = [["0F0", "0F1", "0SEND_F1", "0SEND_F0"], ["1RECV_F1", "1RECV_F0", "1F0", "1F1"]]
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=8)
    first, second = (
        simulate(Schedule.of(orders), [cost] * 2, network=Network(bytes_per_s=8.0)) for orders in (rows, other)
    )
    found = compare(first, second)
    assert found.difference_s == 1.0  # F0 comes behind F1
    assert found.parts_s == {"compute": 0, "messages": 1.0, "device": 0, "residual": 0}


@pytest.mark.parametrize("name", ["afab", "1f1b", "zb-h1"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_stage_that_takes_longer_is_named(name: str, stage: int) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    slow = StageCost(forward_s=6, backward_input_s=4, backward_weight_s=6, output_bytes=8)
    costs = [COST] * 4
    found = compare(
        simulate(schedule, costs, network=NETWORK),
        simulate(schedule, [slow if at == stage else COST for at in range(4)], network=NETWORK),
    )
    here = math.fsum(each.seconds for each in found.contributions if each.stage == stage)
    assert found.difference_s > 0
    assert here == pytest.approx(found.difference_s)
    assert all(abs(each.seconds) < 1e-9 for each in found.contributions if each.stage != stage)
    assert all(found.predicted.trace.program.stage[row] == stage for row in found.largest_rows(by="duration"))


def test_a_slower_link_is_named() -> None:
    schedule = build_schedule("1f1b", ranks=3, microbatches=6)
    slow = dataclasses.replace(NETWORK, links={(1, 2): Link(latency_s=2.0)})
    found = compare(simulate(schedule, [COST] * 3, network=NETWORK), simulate(schedule, [COST] * 3, network=slow))
    top = found.contributions[0]
    assert (top.part, top.source, top.destination) == ("messages", 1, 2)
    assert top.seconds == pytest.approx(found.difference_s)
    assert "messages from rank 1 to 2" in found.explain()


def test_dispatch_is_named_and_what_only_takes_slack_counts_nothing() -> None:
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [COST] * 2)
    late = np.zeros(len(trace.start_s))
    late[trace.program.rows_of(1).stop - 1] = 2.0  # rank 1's last backward, which rank 0's waits for
    run = dataclasses.replace(
        trace,
        start_s=trace.start_s + late,
        end_s=trace.end_s + late,
        message_start_s=trace.message_start_s + late[trace.program.messages.producer],
        message_left_s=trace.message_left_s + late[trace.program.messages.producer],
        message_arrival_s=trace.message_arrival_s + late[trace.program.messages.producer],
    )
    last = np.argmax(run.end_s)
    start, end = run.start_s.copy(), run.end_s.copy()
    start[last] += 2.0
    end[last] += 2.0
    found = compare(trace, dataclasses.replace(run, start_s=start, end_s=end))
    assert found.difference_s == 2.0
    assert found.parts_s == {"compute": 0, "messages": 0, "device": 2.0, "residual": 0}
    assert found.contributions[0].name == "device or dispatch on rank 1"

    shorter = dataclasses.replace(COST, forward_s=2.0)
    slack = compare(
        simulate(trace.schedule, [COST, shorter]), simulate(trace.schedule, [COST, dataclasses.replace(COST)])
    )
    assert slack.difference_s == pytest.approx(1.0)  # of the two forwards that became longer one had slack


def test_memory_is_compared_action_by_action() -> None:
    trace = simulate(build_schedule("1f1b", ranks=2, microbatches=3), [COST] * 2)
    row = trace.program.rows_of(1)[2]
    levels = trace.activation_bytes.copy()
    levels[row:] += 5
    found = compare(trace, dataclasses.replace(trace, activation_bytes=levels))
    assert [(each.rank, each.row, each.measured_bytes - each.predicted_bytes) for each in found.memory] == [(1, row, 5)]
    assert f"from {trace.program.action_of(row)} on" in found.explain()


def test_words_call_only_a_prediction_predicted() -> None:
    """Compared the other way round a prediction used to be called the measured step."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=3)
    predicted = simulate(schedule, [COST] * 2)
    run = dataclasses.replace(simulate(schedule, [COST] * 2, network=NETWORK), clock="measured")
    assert compare(predicted, run).explain().startswith("The measured step takes")
    assert "measured - predicted" in str(compare(predicted, run))
    for pair in ((run, predicted), (run, run), (predicted, predicted)):
        words = str(compare(*pair))
        assert "measured" not in words
        assert "predicted" not in words
        assert "second - first" in words


def test_programs_that_differ_are_refused_by_the_first_difference() -> None:
    def step(name: str, ranks: int, microbatches: int) -> Trace:
        schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
        return simulate(schedule, [COST] * schedule.stages)

    one = step("1f1b", 2, 4)
    with pytest.raises(ValueError, match="2 ranks and 3"):
        compare(one, step("1f1b", 3, 4))
    with pytest.raises(ValueError, match="4 microbatches and 5"):
        compare(one, step("1f1b", 2, 5))
    with pytest.raises(ValueError, match="stages on ranks"):
        compare(one, step("interleaved-1f1b", 2, 4))
    with pytest.raises(ValueError, match="action 2 of rank 0 is 0B0 in the first and 0F2 in the second one"):
        compare(one, step("afab", 2, 4))
    with pytest.raises(ValueError, match="by must be"):
        compare(one, one).largest_rows(by="name")
