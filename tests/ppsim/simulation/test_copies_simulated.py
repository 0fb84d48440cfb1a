"""Steps in both directions: a second evaluator, both engines, conditions, memory, and the sum of the copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppsim
from ppsim import (
    Collectives,
    Conditions,
    InputError,
    Jitter,
    Network,
    Reduction,
    Schedule,
    StageCost,
    build_schedule,
    simulate,
)
from ppsim.export.perfetto import perfetto_json
from tests.support.evaluator import cells, evaluate, spelled
from tests.support.named import BOTH_WAYS
from tests.support.strategies import (
    assume_runs,
    communications,
    conditions,
    exact_seconds,
    networks,
    schedules,
    stage_costs,
)

EVEN = st.integers(1, 3).map(lambda half: 2 * half)
TIMES = ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s", "activation_bytes")
COST = StageCost(
    forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=4, output_bytes=2, parameter_bytes=8
)


@st.composite
def named(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(BOTH_WAYS))
    return build_schedule(name, ranks=draw(EVEN), microbatches=2 * draw(st.integers(1, 7)))


copied = schedules(max_stages=3, max_microbatches=5, copies=2) | named()


@pytest.mark.parametrize("streams", ["link", "pair", "rank"])
@given(data=st.data())
def test_the_model_is_what_the_design_says(streams: str, data: st.DataObject) -> None:
    """Bit for bit, with communication as stated or derived, on each kind of streams and on both engines."""
    schedule = data.draw(copied.flatmap(communications) | copied)
    is_stated = schedule.communication is not None
    assume_runs(schedule, streams)
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    slow = data.draw(st.dictionaries(st.integers(0, schedule.ranks - 1), st.sampled_from([0.5, 2.0]), max_size=2))
    given: dict[str, Any] = {
        "dispatch_s": data.draw(exact_seconds()),
        "send_s": data.draw(exact_seconds()),
        "overlap": data.draw(st.sampled_from([1.0, 0.75])),
        "streams": streams,
    }
    traces = [
        simulate(schedule, costs, network=network, slow_ranks=slow, **given, engine=engine)
        for engine in ("simpy", "compiled")
    ]
    answer = evaluate(
        spelled(schedule),
        schedule.placement,
        costs,
        network,
        factor=lambda stage, microbatch: slow.get(schedule.placement[stage], 1.0),
        posts=cells(schedule.to_csv(messages=True)) if is_stated or streams != "link" else None,
        copies=2,
        **given,
    )
    for trace in traces:
        assert trace.makespan_s == float(answer.makespan)
        assert trace.bubble_s.tolist() == [float(each) for each in answer.bubbles]
        assert trace.peak_activation_bytes.tolist() == answer.peaks
    for name in TIMES:
        assert np.array_equal(getattr(traces[0], name), getattr(traces[1], name)), name


@given(data=st.data())
def test_both_engines_give_the_same_bits_under_any_conditions(data: st.DataObject) -> None:
    schedule = data.draw(copied)
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    given = data.draw(conditions(schedule, sharing=(None,)))
    first, second = (
        simulate(schedule, costs, network=network, conditions=given, engine=engine) for engine in ("simpy", "compiled")
    )
    for name in (*TIMES, "reduce_start_s", "reduce_end_s"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


@given(data=st.data())
def test_costs_of_one_copy_hold_for_all(data: st.DataObject) -> None:
    schedule = data.draw(copied)
    costs = data.draw(stage_costs(schedule.model_stages))
    one, all_ = simulate(schedule, costs), simulate(schedule, costs * 2)
    assert np.array_equal(one.end_s, all_.end_s)
    assert one.parameter_bytes.tolist() == all_.parameter_bytes.tolist()
    for found in (ppsim.attribute(one, expected=costs), ppsim.attribute(one, expected=costs * 2)):
        assert sum(found.parts_s.values()) == pytest.approx(one.bubble_s, abs=1e-9)


def test_other_numbers_of_costs_are_refused() -> None:
    schedule = build_schedule("dualpipe", ranks=4, microbatches=8)
    with pytest.raises(
        InputError, match="5 stage costs for a schedule of 8 stages: give one for each, or one for each"
    ):
        simulate(schedule, [COST] * 5)


@given(data=st.data())
def test_the_copies_bubbles_are_attributed_to_the_last_bit_or_two(data: st.DataObject) -> None:
    schedule = data.draw(copied)
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    trace = simulate(schedule, costs, network=network)
    parts = sum(ppsim.attribute(trace).parts_s.values())
    assert parts == pytest.approx(trace.bubble_s, abs=1e-9 * max(trace.makespan_s, 1.0))


# The sum of the copies


def reduced(name: str, ranks: int, microbatches: int, **ring: Any) -> ppsim.Trace:
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
    return simulate(schedule, [COST] * ranks, reduction=Reduction(**{"replicas": 1, **ring}))


def by_hand(trace: ppsim.Trace, seconds: float) -> list[float]:
    """When each stage of the model is added up: once both copies are complete and both ranks are free."""
    schedule, ranks = trace.schedule, trace.ranks
    ready = [
        max(
            trace.end_s[row]
            for row in range(len(trace.end_s))
            if trace.program.stage[row] % ranks == stage and trace.program.kind[row] in (ppsim.Kind.B, ppsim.Kind.W)
        )
        for stage in range(ranks)
    ]
    free, ends = [0.0] * ranks, [0.0] * ranks
    for stage in sorted(range(ranks), key=lambda each: ready[each]):
        holders = schedule.placement[stage], schedule.placement[stage + ranks]
        ends[stage] = max(ready[stage], *(free[rank] for rank in holders)) + seconds
        for rank in holders:
            free[rank] = ends[stage]
    return ends


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (6, 12)])
def test_both_copies_are_added_up_by_a_ring_of_two(name: str, ranks: int, microbatches: int) -> None:
    """8 bytes: two rounds of 0.25 s and 4 bytes at 2 bytes per second each."""
    trace = reduced(name, ranks, microbatches, latency_s=0.25, bytes_per_s=2.0)
    seconds = 2 * (0.25 + 8 / 2 / 2)
    assert trace.reduce_end_s is not None
    assert trace.reduce_start_s is not None
    assert (trace.reduce_end_s - trace.reduce_start_s).tolist() == [seconds] * (2 * ranks)
    assert trace.reduce_end_s[:ranks].tolist() == by_hand(trace, seconds) == trace.reduce_end_s[ranks:].tolist()
    assert trace.step_s >= trace.makespan_s
    frame = trace.to_frame()
    assert (frame.kind == "REDUCE_GRAD").sum() == 2 * ranks
    assert perfetto_json({"step": trace}).count('REDUCE_GRAD"') >= 2 * ranks


def test_replicas_make_the_ring_larger() -> None:
    two, eight = (reduced("chimera", 4, 4, replicas=d, latency_s=1.0) for d in (1, 4))
    for trace, members in ((two, 2), (eight, 8)):
        assert trace.reduce_end_s is not None
        assert trace.reduce_start_s is not None
        assert (trace.reduce_end_s - trace.reduce_start_s).tolist() == [2.0 * (members - 1)] * 8


def test_without_a_ring_the_sum_takes_no_time() -> None:
    trace = simulate(build_schedule("dualpipe", ranks=2, microbatches=4), [COST] * 2)
    assert trace.reduce_end_s is None
    assert trace.step_s == trace.makespan_s


def test_one_direction_and_one_replica_have_nothing_to_add() -> None:
    assert (
        simulate(
            build_schedule("1f1b", ranks=2, microbatches=4), [COST] * 2, reduction=Reduction(replicas=1)
        ).reduce_end_s
        is None
    )


def test_samples_without_spread_are_the_step() -> None:
    schedule = build_schedule("dualpipe", ranks=4, microbatches=8)
    given = Conditions(reduction=Reduction(replicas=1, latency_s=0.5))
    trace = simulate(schedule, [COST] * 4, conditions=given)
    steps = ppsim.monte_carlo(schedule, [COST] * 4, jitter=Jitter(), samples=3, conditions=given)
    assert steps.step_s.tolist() == [trace.step_s] * 3
    assert steps.trace(1).makespan_s == trace.makespan_s


def test_gathered_parameters_are_of_one_copy() -> None:
    schedule = build_schedule("dualpipe", ranks=2, microbatches=4)
    with pytest.raises(InputError, match="collectives are of one copy of the model, and this schedule has 2"):
        simulate(schedule, [COST] * 2, collectives=Collectives(replicas=2))


# What looks at stages


def test_a_rank_s_cost_is_that_of_each_of_its_copies() -> None:
    """A microbatch passes a rank once. Cause of a bug to be: it was shared by two stages, so both cost half."""
    schedules = [build_schedule(name, ranks=4, microbatches=8) for name in ("1f1b", "dualpipe", "dualpipe-v")]
    traces = ppsim.compare_schedules(schedules, rank_cost=COST).traces
    computed = {name: float((trace.end_s - trace.start_s).sum()) for name, trace in traces.items()}
    assert computed["1f1b"] == computed["dualpipe"] == computed["dualpipe-v"]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_search_of_two_stages_in_a_v_does_not_take_them_for_its_own(name: str) -> None:
    """Cause of a bug to be: they have its placement and other messages."""
    found = ppsim.search([COST] * 4, ranks=2, microbatches=4, stages_per_rank=2, placement="v", memory_limit_bytes=64)
    assert found.schedule.copies == 1
    found.schedule.check()


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_plans_and_runs_of_one_copy_refuse_them(name: str) -> None:
    model = ppsim.Transformer.gpt(layers=8, hidden=64, heads=4, vocabulary=512, positions=64)
    with pytest.raises(InputError, match=f"{name} holds 2 copies of the model, which a training step does not count"):
        ppsim.TrainingStep(
            model=model, seq=64, micro_batch_size=2, microbatches=8, pp=4, schedule=name, stages_per_rank=2
        )
    with pytest.raises(InputError, match=f"{name} holds 2 copies of the model, which a plan does not count"):
        ppsim.Choices(schedules=(name,))
    both = build_schedule(name, ranks=2, microbatches=4)
    trace = simulate(both, [COST] * 2)
    with pytest.raises(InputError, match=f"{name} has 2 copies of the model: a run is of one"):
        ppsim.Run(traces=[trace], steps=[0])
    run = ppsim.Run(traces=[simulate(build_schedule("1f1b", ranks=2, microbatches=4), [COST] * 2)], steps=[0])
    with pytest.raises(InputError, match=f"{name} has 2 copies of the model and the run has one"):
        ppsim.costs_of(run).predict(both)


def test_advice_says_why_they_are_left_out() -> None:
    run = ppsim.Run(traces=[simulate(build_schedule("1f1b", ranks=4, microbatches=8), [COST] * 4)], steps=[0])
    advice = ppsim.advise(run)
    assert set(BOTH_WAYS) <= set(advice.left_out)
    assert all("holds 2 copies of the model, and the run holds one" in advice.left_out[name] for name in BOTH_WAYS)


def test_messages_take_links_in_both_directions_at_once() -> None:
    """Of two ranks each sends forwards to the other, so one slow link slows one copy's forwards alone."""
    schedule = build_schedule("chimera", ranks=2, microbatches=2)
    slow = Network.of(ppsim.Link(), {(0, 1): ppsim.Link(latency_s=5.0)})
    trace = simulate(schedule, [COST] * 2, network=slow)
    rows = {str(trace.program.action_of(row)): trace.start_s[row] for row in range(len(trace.start_s))}
    assert (rows["1F0"], rows["3F1"]) == (6.0, 1.0)
