"""Attribution of what `simulate`'s refinements add: shared cores, dispatch, slow ranks, receive windows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Network, Schedule, StageCost, Trace, attribute, build_schedule, compare, critical_path, simulate
from ppsim.explain.step_graph import StepGraph, replay
from tests.support import strategies
from tests.support.traces import COST, B, F, check_sums, check_waits

FREE = Network()


@st.composite
def refined(
    draw: st.DrawFn, *, sharing: tuple[str | None, ...] = (None, "turns", "fair"), free: bool = False
) -> tuple[Trace, list[StageCost]]:
    """A step with refinements, and the costs it was made from. free: messages and dispatch take no time."""
    plain = strategies.schedules()
    schedule = draw(plain | plain.flatmap(strategies.communications) | plain.flatmap(strategies.offloads))
    strategies.assume_runs(schedule)
    costs = draw(strategies.stage_costs(schedule.stages))
    network = FREE if free else draw(strategies.networks(schedule.ranks))
    conditions = draw(strategies.conditions(schedule, sharing=sharing))
    if free:
        conditions = replace(conditions, dispatch_s=0.0, send_s=0.0)
    engine = (
        "simpy"
        if conditions.cores or conditions.devices or conditions.speeds
        else draw(st.sampled_from(["simpy", "compiled"]))
    )
    return simulate(schedule, costs, network=network, engine=engine, conditions=conditions), costs


def without_slow_ranks(trace: Trace, costs: list[StageCost]) -> npt.NDArray[np.float64]:
    """What each rank should compute for."""
    asked = {name: getattr(trace.conditions, name) for name in ("overlap", "scale")}
    return simulate(trace.schedule, costs, engine="compiled", **asked).compute_s


@given(refined())
def test_parts_add_up_whatever_was_asked_for(step: tuple[Trace, list[StageCost]]) -> None:
    trace, costs = step
    check_sums(trace)
    check_sums(trace, expected=costs)
    stretched_s = attribute(trace, expected=costs).stretched_s
    assert stretched_s is not None
    assert (stretched_s >= 0).all()
    assert (stretched_s >= trace.compute_s - without_slow_ranks(trace, costs) - 1e-9 * trace.makespan_s).all()


@given(refined(sharing=(None, "turns")))
def test_waits_are_what_is_seen_at_each_moment_whatever_was_asked_for(step: tuple[Trace, list[StageCost]]) -> None:
    check_waits(step[0])


def test_waits_of_a_long_uneven_step_are_what_is_seen_at_each_moment() -> None:
    """So many pieces of idle time that their table has to grow, more than once."""
    schedule = build_schedule("1f1b", ranks=4, microbatches=24)
    scale = np.random.default_rng(0).integers(1, 40, (4, 24)) / 16
    check_waits(simulate(schedule, [COST] * 4, network=Network(latency_s=0.5, bytes_per_s=8.0), scale=scale))


@given(refined())
def test_paths_tile_and_replays_repeat_the_step_whatever_was_asked_for(step: tuple[Trace, list[StageCost]]) -> None:
    trace, _ = step
    path = critical_path(trace)
    assert path.length_s == trace.makespan_s
    assert sum(path.by_what_s.values()) == pytest.approx(trace.makespan_s)
    graph = StepGraph.of(trace)
    again = replay(graph.wiring, graph.edge_times)
    assert again.end_s == pytest.approx(graph.times.end_s, abs=1e-12 * max(1.0, trace.makespan_s))


@given(st.data())
def test_differences_that_options_make_are_explained_to_the_last(data: st.DataObject) -> None:
    schedule = data.draw(strategies.schedules())
    one, other = (
        simulate(
            schedule,
            data.draw(strategies.stage_costs(schedule.stages)),
            network=data.draw(strategies.networks(schedule.ranks)),
            conditions=data.draw(strategies.conditions(schedule)),
        )
        for _ in range(2)
    )
    found = compare(one, other)
    size = max(one.makespan_s, other.makespan_s)
    assert math.fsum(each.seconds for each in found.contributions) == pytest.approx(found.difference_s, abs=1e-9 * size)
    assert abs(found.residual_s) <= 1e-9 * size


@given(refined(sharing=(None,), free=True))
def test_without_shared_cores_or_dispatch_nobody_waits_for_a_device(step: tuple[Trace, list[StageCost]]) -> None:
    trace, _ = step
    found = attribute(trace)
    assert not found.device_s.any()
    assert not found.warm_up_of_s["device"].any()
    assert not found.drain_of_s["device"].any()


def test_waiting_for_the_one_core_is_a_devices() -> None:
    """Rank 1 has 1F0's input at 3 s, when rank 0 takes the core again; rank 0 would have had 0F1's time anyway.

    core    0F0 0F1 1F0 1F1  or  0F0 1F0 0F1 1F1, as the queue has it: in both somebody waits for 3 s.
    """
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2).forward_only(), [COST] * 2, cores=1)
    found = attribute(trace)
    assert trace.makespan_s == 4 * F
    waited = found.device_s + found.warm_up_of_s["device"] + found.drain_of_s["device"]
    assert waited.sum() >= F
    assert not found.messages_s.any()
    assert not found.straggler_s.any()
    alone = attribute(simulate(trace.schedule, [COST] * 2, cores=2))
    assert not alone.device_s.any()
    assert compare(alone.trace, trace).parts_s == {
        "compute": 0,
        "messages": 0,
        "device": pytest.approx(F),
        "residual": pytest.approx(0),
    }


@pytest.mark.parametrize("name", ["afab", "1f1b"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_a_core_for_all_costs_is_a_devices(name: str, ranks: int) -> None:
    """One core: everything runs in sequence. What is not the pipeline's own fill and drain is waiting for the core."""
    schedule = build_schedule(name, ranks=ranks, microbatches=8)
    alone, shared = (attribute(simulate(schedule, [COST] * ranks, **how)) for how in ({}, {"cores": 1}))
    assert shared.trace.makespan_s == pytest.approx(ranks * 8 * (F + B))
    assert not shared.messages_s.any()
    assert not shared.straggler_s.any()
    of_device = shared.device_s + shared.warm_up_of_s["device"] + shared.drain_of_s["device"]
    assert of_device.sum() > 0.5 * (shared.bubble_s - alone.bubble_s).sum()


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 2), (2, 5), (4, 9)])
def test_dispatch_is_a_devices(ranks: int, microbatches: int) -> None:
    """Every action starts 1/4 s after it could: one's own, and those of the ranks that one waits for."""
    schedule, late = build_schedule("afab", ranks=ranks, microbatches=microbatches), 0.25
    found = attribute(simulate(schedule, [COST] * ranks, dispatch_s=late))
    before, behind = np.arange(ranks), ranks - 1 - np.arange(ranks)
    assert found.device_s == pytest.approx(late * (2 * microbatches - 1 + 2 * behind))
    assert found.warm_up_s == pytest.approx(before * (F + late) + behind * (F + B))  # the step begins as rank 0 does
    assert found.warm_up_of_s["device"] == pytest.approx(before * late)
    assert found.drain_s == pytest.approx(before * (B + late))
    for name in ("imbalance", "messages", "straggler"):
        assert not found.parts_s[name].any()


@pytest.mark.parametrize("name", ["afab", "1f1b"])
def test_a_slow_rank_was_not_expected_to_be_slow(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    trace = simulate(schedule, [COST] * 4, slow_ranks={1: 2.0})
    found = attribute(trace, expected=[COST] * 4)
    assert found.straggler_s[[0, 2, 3]].min() > 0
    assert not found.imbalance_s.any()
    assert found.stretched_s is not None
    assert found.stretched_s.tolist() == [0, 8 * (F + B), 0, 0]
    assert attribute(trace).imbalance_s[2:].min() > 0  # by itself it looks like a stage with more to do
    assert attribute(trace).stretched_s is None


def test_a_long_microbatch_and_an_overlap_that_were_asked_for_were_expected() -> None:
    scale = [1, 1, 4, 1, 1, 1, 1, 1]
    schedule = build_schedule("dualpipe-v", ranks=4, microbatches=8)
    costs = [COST] * schedule.stages
    for how in ({"scale": scale}, {"overlap": 1.5}, {"scale": scale, "overlap": 0.75}):
        found = attribute(simulate(schedule, costs, **how), expected=costs)
        assert found.stretched_s is not None
        assert not found.stretched_s.any()
        assert not found.straggler_s.any()
    slow = attribute(simulate(schedule, costs, scale=scale, slow_ranks={2: 1.5}), expected=costs)
    assert slow.stretched_s is not None
    assert slow.stretched_s.tolist() == [0, 0, pytest.approx(slow.trace.compute_s[2] / 3), 0]


def test_a_small_receive_window_is_message_time() -> None:
    """Each message leaves only when the one before is used, and takes 4 s, one more than rank 1 needs for it.

    rank 0  F0 F1 F2 F3
    rank 1           F0 w F1 w F2 w F3
    """
    schedule = build_schedule("afab", ranks=2, microbatches=4).forward_only()
    ahead, behind = (
        attribute(simulate(schedule, [COST] * 2, network=Network(latency_s=F + 1), receive_window=window))
        for window in (None, 1)
    )
    assert not ahead.messages_s.any()
    assert behind.messages_s.tolist() == [0, 3]
    assert not behind.device_s.any()
    assert behind.drain_of_s["messages"][0] == ahead.drain_of_s["messages"][0] + 3


def test_sharing_evenly_stretches_and_does_not_wait() -> None:
    """Two ranks on one core: what they do at once takes twice as long, and no one queues for the core."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=6)
    trace = simulate(schedule, [COST] * 2, cores=1, sharing="fair")
    found = attribute(trace, expected=[COST] * 2)
    assert found.stretched_s is not None
    assert found.stretched_s == pytest.approx(trace.compute_s - 6 * (F + B))
    assert found.stretched_s.min() > F
    assert found.device_s == pytest.approx(0, abs=1e-9)
    assert found.to_dict()["stretched_s"] == found.stretched_s.tolist() == found.to_frame()["stretched_s"].tolist()
    assert "beyond what was expected" in str(found)
    assert attribute(trace).to_dict()["stretched_s"] is None


BLOCKED = Schedule.of(
    [
        ["0F0", "0SEND_F0", "0RECV_B0", "0F1", "0SEND_F1", "0B0", "0RECV_B1", "0B1"],
        ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1"],
    ]
)


def test_waiting_for_a_stream_is_a_part_of_its_own() -> None:
    """0SEND_F1 stands behind 0RECV_B0. F takes 1 s, B 2 s, a transfer 1 s.

    Rank 1 waits from 5, when it has sent B0, to 7: until 6 its own stream carries B0, from 6 to 7 F1 is in transfer.
    """
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=1)
    step = simulate(BLOCKED, [cost] * 2, network=Network(bytes_per_s=1), streams="rank")
    found = attribute(step)
    assert found.streams_s.tolist()[1] == 1.0
    assert found.transfer_s.tolist()[1] == 1.0
    assert critical_path(step).length_s == step.makespan_s
    free = attribute(simulate(BLOCKED.with_communication("derived"), [cost] * 2, network=Network(bytes_per_s=1)))
    assert not free.streams_s.any()
    assert not free.streams_knock_on_s.any()


def test_without_messages_that_take_time_streams_may_still_make_ranks_wait() -> None:
    """A send that stands late is waited for, though nothing is under way: all of it is the stream's."""
    late = Schedule.of([["0F0", "0F1", "0SEND_F0", "0SEND_F1"], ["1RECV_F0", "1F0", "1RECV_F1", "1F1"]])
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    found = attribute(simulate(late, [cost] * 2))
    assert found.warm_up_of_s["streams"].tolist() == [0.0, 1.0]
    assert found.warm_up_of_s["compute"].tolist() == [0.0, 1.0]
