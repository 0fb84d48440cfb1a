"""The model against an independent evaluator of the design's meanings, and against theory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Conditions,
    CostError,
    Link,
    Network,
    Reduction,
    Schedule,
    ScheduleError,
    StageCost,
    Trace,
    build_schedule,
    simulate,
)
from ppsim.schedule.deadlock import smallest_receive_window
from tests.support.evaluator import Answer, cells, evaluate, spelled
from tests.support.strategies import assume_runs, communications, exact_seconds, networks, schedules, stage_costs


def _assert_equal(trace: Trace, answer: Answer) -> None:
    """To the last bit: the strategies' numbers add up without rounding."""
    program = trace.program
    for rank in range(program.ranks):
        first, last = int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])
        starts = trace.start_s[program.action_start[first:last]]
        ends = trace.end_s[program.action_start[first + 1 : last + 1] - 1]
        assert starts.tolist() == answer.starts[rank]
        assert ends.tolist() == answer.ends[rank]
    messages = program.messages
    found = {}
    for k in range(len(messages)):
        ends_of = (program.action_of(int(messages.producer[k])), program.action_of(int(messages.consumer[k])))
        pair = tuple((a.stage, a.kind.name, a.microbatch) for a in ends_of)
        found[pair] = (trace.message_start_s[k], trace.message_left_s[k], trace.message_arrival_s[k])
    assert found == answer.transfers
    assert trace.makespan_s == answer.makespan
    assert trace.rank_time_s.tolist() == answer.rank_times
    assert trace.bubble_s.tolist() == answer.bubbles
    assert trace.bubble_fraction == float(answer.bubble_fraction)
    assert trace.peak_activation_bytes.tolist() == answer.peaks


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
@given(data=st.data())
def test_the_model_is_what_the_design_says(engine: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    costs = data.draw(stage_costs(schedule.stages))
    network = data.draw(networks(schedule.ranks))
    overlap = data.draw(st.sampled_from([1.0, 0.5, 0.75, 1.25]))
    trace = simulate(schedule, costs, network=network, overlap=overlap, engine=engine)
    _assert_equal(trace, evaluate(spelled(schedule), schedule.placement, costs, network, overlap))


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
@given(data=st.data())
def test_so_is_an_evaluation(engine: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules()).forward_only()
    costs = data.draw(stage_costs(schedule.stages))
    network = data.draw(networks(schedule.ranks))
    _assert_equal(
        simulate(schedule, costs, network=network, engine=engine),
        evaluate(spelled(schedule), schedule.placement, costs, network),
    )


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
@given(data=st.data())
def test_so_are_the_refinements_together(engine: str, data: st.DataObject) -> None:
    """Microbatches of different length, slow ranks, dispatch and rendezvous, none special to an engine."""
    schedule = data.draw(schedules())
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    factors = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    scale = np.array(
        data.draw(
            st.lists(
                st.lists(factors, min_size=schedule.microbatches, max_size=schedule.microbatches),
                min_size=schedule.stages,
                max_size=schedule.stages,
            )
        )
    )
    slow = data.draw(st.dictionaries(st.integers(0, schedule.ranks - 1), st.sampled_from([0.5, 2.0, 4.0])))
    dispatch_s, send_s = data.draw(exact_seconds()), data.draw(exact_seconds())
    window = data.draw(
        st.none() | st.integers(0, 3).map(lambda m: m + max(smallest_receive_window(schedule.program), 1))
    )
    trace = simulate(
        schedule,
        costs,
        network=network,
        scale=scale,
        slow_ranks=slow,
        dispatch_s=dispatch_s,
        send_s=send_s,
        receive_window=window,
        engine=engine,
    )
    answer = evaluate(
        spelled(schedule),
        schedule.placement,
        costs,
        network,
        factor=lambda stage, microbatch: scale[stage, microbatch] * slow.get(schedule.placement[stage], 1.0),
        dispatch_s=dispatch_s,
        send_s=send_s,
        window=window,
    )
    _assert_equal(trace, answer)


@pytest.mark.parametrize("streams", ["link", "pair", "rank"])
@given(data=st.data())
def test_communication_as_written_runs_on_its_streams(streams: str, data: st.DataObject) -> None:
    """Both engines, and where a device is shared by as many ranks as it has cores, so that nobody waits for it."""
    schedule = data.draw(schedules().flatmap(communications) | schedules())
    is_stated = schedule.communication is not None
    assume_runs(schedule, streams)
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    slow = data.draw(st.dictionaries(st.integers(0, schedule.ranks - 1), st.sampled_from([0.5, 2.0]), max_size=2))
    dispatch_s, send_s = data.draw(exact_seconds()), data.draw(exact_seconds())
    conditions = Conditions(slow_ranks=slow, dispatch_s=dispatch_s, send_s=send_s, streams=streams)
    traces = [
        simulate(schedule, costs, network=network, conditions=conditions, engine=engine)
        for engine in ("simpy", "compiled")
    ]
    answer = evaluate(
        spelled(schedule),
        schedule.placement,
        costs,
        network,
        factor=lambda stage, microbatch: slow.get(schedule.placement[stage], 1.0),
        dispatch_s=dispatch_s,
        send_s=send_s,
        posts=cells(schedule.to_csv(messages=True)) if is_stated or streams != "link" else None,
        streams=streams,
    )
    for trace in traces:
        _assert_equal(trace, answer)
    for name in ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s"):
        assert np.array_equal(getattr(traces[0], name), getattr(traces[1], name))


@given(data=st.data())
def test_fewer_streams_are_never_faster(data: st.DataObject) -> None:
    """All sequences are fixed by where communication stands, so what has to wait for more ends no earlier."""
    schedule = data.draw(schedules()).with_communication(data.draw(st.sampled_from(["early", "late"])))
    assume_runs(schedule, "rank")
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    ends = [
        simulate(schedule, costs, network=network, streams=streams, engine="compiled").end_s
        for streams in ("link", "pair", "rank")
    ]
    ends.insert(0, simulate(schedule.with_communication("derived"), costs, network=network, engine="compiled").end_s)
    for fast, slow in itertools.pairwise(ends):
        assert (fast <= slow).all()


def test_a_receive_that_stands_early_blocks_a_send() -> None:
    """Rank 0 posts a receive before its second send: on one communicator the send waits until the other side answers.

    F takes 1 s, B 2 s, a transfer 1 s. 0F0 ends at 1, its message leaves at 2. 1F0 runs to 3, 1B0 to 5, and its message
    leaves at 6. On one communicator 0SEND_F1 stands behind 0RECV_B0: it leaves at 7 and 1F1 starts then. On links of
    their own it waits until it is received, at 5, and 1F1 starts at 6.
    """
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=1)
    schedule = Schedule.of(
        [
            ["0F0", "0SEND_F0", "0RECV_B0", "0F1", "0SEND_F1", "0B0", "0RECV_B1", "0B1"],
            ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1"],
        ]
    )
    network = Network(bytes_per_s=1)
    starts = {
        streams: simulate(schedule, [cost] * 2, network=network, streams=streams).to_frame().query("kind == 'F'")
        for streams in ("link", "rank")
    }
    of_1f1 = {
        streams: float(frame[(frame.stage == 1) & (frame.microbatch == 1)].start_s.iloc[0])
        for streams, frame in starts.items()
    }
    assert of_1f1 == {"link": 6.0, "rank": 7.0}


_any_seconds = st.floats(0, 1e3)


@given(st.data())
def test_with_any_numbers_it_differs_by_roundings_only(data: st.DataObject) -> None:
    schedule = data.draw(schedules(max_ranks=3, max_stages=4, max_microbatches=3))
    cost = st.builds(
        StageCost,
        forward_s=_any_seconds,
        backward_input_s=_any_seconds,
        backward_weight_s=_any_seconds,
        output_bytes=st.integers(0, 10**9),
    )
    costs = data.draw(st.lists(cost, min_size=schedule.stages, max_size=schedule.stages))
    network = Network(latency_s=data.draw(_any_seconds), bytes_per_s=data.draw(st.floats(1e6, 1e12)))
    overlap = data.draw(st.floats(0.1, 3.0))
    trace = simulate(schedule, costs, network=network, overlap=overlap)
    answer = evaluate(spelled(schedule), schedule.placement, costs, network, overlap)
    assert trace.makespan_s == pytest.approx(float(answer.makespan), rel=1e-12, abs=1e-300)
    assert trace.bubble_s == pytest.approx([float(b) for b in answer.bubbles], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_afab_equals_theory(ranks: int, latency_s: float) -> None:
    """makespan (m + p - 1)(F + B) + 2 (p - 1) c: latency does not occupy a link."""
    forward_s, backward_s = 0.7, 1.9
    cost = StageCost(forward_s=forward_s, backward_input_s=1.0, backward_weight_s=0.9)
    for microbatches in range(1, 33):
        schedule = build_schedule("afab", ranks=ranks, microbatches=microbatches)
        trace = simulate(schedule, [cost] * ranks, network=Network(latency_s=latency_s))
        makespan_s = (microbatches + ranks - 1) * (forward_s + backward_s) + 2 * (ranks - 1) * latency_s
        compute_s = microbatches * (forward_s + backward_s)
        assert trace.makespan_s == pytest.approx(makespan_s, rel=1e-9)
        assert trace.bubble_s == pytest.approx([makespan_s - compute_s] * ranks, abs=1e-9 * makespan_s)
        assert trace.bubble_fraction == pytest.approx(1 - compute_s / makespan_s, abs=1e-9)
        if latency_s == 0:
            assert trace.bubble_fraction == pytest.approx((ranks - 1) / (microbatches + ranks - 1), abs=1e-9)


def test_a_link_carries_one_transfer_after_another() -> None:
    """F0 and F1 end at 1 and 2; each message keeps the link for 3 s and arrives 0.5 s after it has left."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    cost = StageCost(forward_s=1, backward_input_s=0, backward_weight_s=0, output_bytes=30)
    trace = simulate(schedule, [cost, cost], network=Network(latency_s=0.5, bytes_per_s=10))
    assert trace.message_start_s.tolist() == [1, 4]
    assert trace.message_left_s.tolist() == [4, 7]
    assert trace.message_arrival_s.tolist() == [4.5, 7.5]
    assert trace.start_s.tolist() == [0, 1, 4.5, 7.5]


def test_messages_have_the_lower_stages_output_bytes_both_ways() -> None:
    costs = [
        StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=size) for size in (10, 20, 30)
    ]
    trace = simulate(build_schedule("afab", ranks=3, microbatches=1), costs)
    messages = trace.program.messages
    between = {
        frozenset((int(a), int(b))): int(size)
        for a, b, size in zip(messages.source, messages.destination, trace.message_bytes, strict=True)
    }
    assert between == {frozenset((0, 1)): 10, frozenset((1, 2)): 20}
    assert trace.message_bytes.tolist().count(10) == 2


def test_a_slow_link_one_way_slows_that_way_only() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=0)
    network = Network(links={(1, 0): Link(latency_s=5)})
    trace = simulate(build_schedule("afab", ranks=2, microbatches=1), [cost, cost], network=network)
    assert dict(zip(trace.program.links(), trace.message_arrival_s - trace.message_left_s, strict=True)) == {
        (0, 1): 0,
        (1, 0): 5,
    }
    assert trace.makespan_s == 9


def test_costs_of_nothing_make_a_step_of_nothing() -> None:
    cost = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    trace = simulate(build_schedule("afab", ranks=2, microbatches=3), [cost, cost])
    assert (trace.makespan_s, trace.bubble_fraction) == (0, 0)


_COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=2**53)


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        ([_COST], {}, "1 stage costs for a schedule of 2 stages"),
        ([_COST] * 3, {}, "3 stage costs for a schedule of 2 stages"),
        ([_COST] * 2, {"overlap": 0.0}, "overlap must be a finite number > 0, got 0.0"),
        ([_COST] * 2, {"overlap": math.nan}, "overlap must be a number, got nan"),
        ([_COST] * 2, {"overlap": math.inf}, "overlap must be a finite number > 0, got inf"),
        ([_COST] * 2, {"engine": "fast"}, "unknown engine 'fast': known are simpy"),
        ([_COST] * 2, {"engine": "compiled", "cores": 1}, "the compiled engine has no shared devices"),
        ([_COST] * 2, {"streams": "node"}, "streams must be"),
        ([_COST] * 2, {"streams": "rank", "receive_window": 2}, "receive_window is of receives posted ahead on links"),
        ([_COST] * 2, {"scale": [1.0, 2.0, 3.0]}, "scale has shape (3,): give one that broadcasts to (2, 2)"),
        ([_COST] * 2, {"scale": -1.0}, "scale must be factors, finite and >= 0, got -1.0"),
        ([_COST] * 2, {"slow_ranks": {2: 2.0}}, "slow_ranks has rank 2, but there are 2 ranks"),
        ([_COST] * 2, {"slow_ranks": {1: 0.0}}, "slow_ranks[1] must be a finite factor > 0, got 0.0"),
        ([_COST] * 2, {"dispatch_s": -1.0}, "dispatch_s must be seconds, finite and >= 0, got -1.0"),
        ([_COST] * 2, {"receive_window": 0}, "receive_window must be a whole number of 1 or more, got 0"),
        ([_COST] * 2, {"cores": 0}, "cores must be a whole number of 1 or more, got 0"),
        ([_COST] * 2, {"devices": [0]}, "devices names 1 devices for 2 ranks"),
        ([_COST] * 2, {"devices": [0, -1]}, "devices are counted from 0, got [0, -1]"),
        ([_COST] * 2, {"cores": 1, "sharing": "luck"}, "sharing must be one of turns, fair, got 'luck'"),
        (
            [_COST] * 2,
            {"cores": 1, "sharing": "fair", "sharing_efficiency": 0.0},
            "must be above 0 and at most 1, got 0",
        ),
        ([_COST] * 2, {"cores": 1, "sharing_efficiency": 0.5}, "give it with sharing 'fair'"),
        ([_COST] * 2, {"sharing_efficiency": 0.5}, "give it with cores or devices"),
        # Cause of a bug: infinite times, and a bubble that is not a number.
        ([_COST] * 2, {"network": Network(bytes_per_s=1e-300)}, "the step takes longer than a float holds"),
        # Cause of a bug: reductions were not looked at, and a step took an infinite time.
        (
            [replace(_COST, parameter_bytes=10**9)] * 2,
            {"reduction": Reduction(replicas=2, bytes_per_s=1e-308)},
            "the step takes longer than a float holds",
        ),
        (
            [StageCost(forward_s=1e308, backward_input_s=1e308, backward_weight_s=1e308)] * 2,
            {},
            "the step takes longer than a float holds",
        ),
    ],
)
def test_bad_arguments_are_refused(stages: list[StageCost], options: dict, said: str) -> None:
    with pytest.raises(
        ValueError, match=r"stage|streams|overlap|engine|float|scale|slow|dispatch|window|cores|devices|sharing"
    ) as caught:
        simulate(build_schedule("afab", ranks=2, microbatches=2), stages, **options)
    assert said in str(caught.value)


def test_schedules_that_hang_are_refused() -> None:
    schedule = Schedule.of([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]])
    with pytest.raises(ScheduleError, match="would wait for ever"):
        simulate(schedule, [_COST] * 2)


def test_activations_beyond_64_bits_are_refused() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=2**53)
    with pytest.raises(CostError, match="activation_bytes"):
        simulate(build_schedule("afab", ranks=1, microbatches=1024), [cost])


def test_the_trace_says_how_it_was_made() -> None:
    network = Network(latency_s=0.25, links={(0, 1): Link()})
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [_COST] * 2, network=network, overlap=0.5)
    assert trace.clock == "simulated"
    assert trace.conditions == Conditions(overlap=0.5)
    known = {"engine": "simpy", "latency_s": 0.25, "bytes_per_s": None, "links": 1}
    assert known.items() <= trace.details.items()
    assert np.isfinite(trace.end_s).all()


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_dispatch_may_differ_from_action_to_action(engine: str) -> None:
    schedule = build_schedule("afab", ranks=1, microbatches=2)
    dispatch_s = [0.5, 0.25, 1.0, 2.0]
    trace = simulate(schedule, [_COST], dispatch_s=dispatch_s, engine=engine)
    plain = simulate(schedule, [_COST], engine=engine)
    assert (trace.start_s - plain.start_s).tolist() == pytest.approx(np.cumsum(dispatch_s).tolist())
    assert np.array_equal(trace.conditions.dispatch_s, dispatch_s)
    with pytest.raises(ValueError, match=r"dispatch_s has shape \(3,\)"):
        simulate(schedule, [_COST], dispatch_s=[1, 2, 3], engine=engine)
