"""Ranks that share cores: against closed forms, a scheduler of time slices, and what no sharing may do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Network, StageCost, Trace, attribute, build_schedule, simulate
from tests.support.strategies import networks, schedules, stage_costs

_COST = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)


def _most_at_once(trace: Trace) -> int:
    """The largest number of actions that compute at the same moment."""
    program = trace.program
    first, last = program.action_start[:-1], program.action_start[1:] - 1
    starts, ends = trace.start_s[first], trace.end_s[last]
    lasting = ends > starts
    edges = sorted([(time, 1) for time in starts[lasting]] + [(time, -1) for time in ends[lasting]])
    return int(np.max(np.cumsum([step for _, step in edges]), initial=0))


@given(data=st.data(), sharing=st.sampled_from(["turns", "fair"]))
def test_as_many_cores_as_ranks_change_nothing(data: st.DataObject, sharing: str) -> None:
    schedule = data.draw(schedules())
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    alone = simulate(schedule, costs, network=network)
    shared = simulate(schedule, costs, network=network, cores=schedule.ranks, sharing=sharing)
    assert np.array_equal(alone.start_s, shared.start_s)
    assert np.array_equal(alone.end_s, shared.end_s)
    each = simulate(schedule, costs, network=network, devices=range(schedule.ranks), sharing=sharing)
    assert np.array_equal(alone.end_s, each.end_s)


@given(data=st.data(), sharing=st.sampled_from(["turns", "fair"]), cores=st.integers(1, 3))
def test_no_core_does_more_than_a_core_can(data: st.DataObject, sharing: str, cores: int) -> None:
    schedule = data.draw(schedules(least=2))
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    alone = simulate(schedule, costs, network=network)
    shared = simulate(schedule, costs, network=network, cores=cores, sharing=sharing)
    work_s = alone.compute_s.sum()
    assert shared.makespan_s >= work_s / cores * (1 - 1e-12)
    assert (shared.peak_activation_bytes == alone.peak_activation_bytes).all()
    if sharing == "turns":
        assert _most_at_once(shared) <= cores
        assert shared.compute_s == pytest.approx(alone.compute_s, rel=1e-9)
    else:
        assert (shared.end_s - shared.start_s >= (alone.end_s - alone.start_s) * (1 - 1e-9)).all()
    if cores == 1 and not len(alone.program.messages):
        assert shared.makespan_s == pytest.approx(work_s)


@pytest.mark.parametrize("sharing", ["turns", "fair"])
def test_one_core_without_messages_is_never_idle(sharing: str) -> None:
    """So a step takes all the work there is, 4 ranks x 3 microbatches x 3 s."""
    trace = simulate(build_schedule("1f1b", ranks=4, microbatches=3), [_COST] * 4, cores=1, sharing=sharing)
    assert trace.makespan_s == pytest.approx(36)


def test_turns_are_first_come_first_served() -> None:
    """Two devices of one core: ranks 0 and 1 share the first. F1 of rank 0 was asked for before F0 of rank 1."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    trace = simulate(schedule, [_COST] * 2, cores=1)
    assert trace.start_s.tolist() == [0, 1, 2, 3]


def test_a_fair_share_stretches_what_runs_together() -> None:
    """Rank 0 computes 0F1 while rank 1 computes 1F0: on one core each takes 2 s. 1F1 has the core to itself."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    trace = simulate(schedule, [_COST] * 2, cores=1, sharing="fair")
    assert trace.start_s.tolist() == [0, 1, 1, 3]
    assert trace.end_s.tolist() == [1, 3, 3, 4]


def test_a_share_that_loses_some_is_that_much_slower_where_cores_are_wanted() -> None:
    """As above at half efficiency: alone 0F0 has half of what one core could give, together each has a quarter."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    trace = simulate(schedule, [_COST] * 2, cores=1, sharing="fair", sharing_efficiency=0.5)
    assert trace.start_s.tolist() == [0, 2, 2, 6]
    assert trace.end_s.tolist() == [2, 6, 6, 8]


def test_a_rank_alone_loses_nothing_on_several_cores() -> None:
    """Of two cores at 3/4: one rank runs at full speed, two at 3/4."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    trace = simulate(schedule, [_COST] * 2, cores=2, sharing="fair", sharing_efficiency=0.75)
    assert trace.start_s.tolist() == pytest.approx([0, 1, 1, 1 + 4 / 3])
    assert trace.end_s.tolist() == pytest.approx([1, 1 + 4 / 3, 1 + 4 / 3, 2 + 4 / 3])


@given(works=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=6), cores=st.integers(1, 3))
def test_a_fair_share_is_what_ever_thinner_time_slices_tend_to(works: list[tuple[int, int]], cores: int) -> None:
    """Jobs (arrival, work) dealt out slice by slice by hand."""
    import simpy

    from ppsim.simulation.engines.shared_engine import FairShare

    environment = simpy.Environment()
    share = FairShare(environment, [min(1.0, cores / count) for count in range(1, 7)])
    ended: dict[int, float] = {}

    def job(number: int, arrives: int, work: int):
        yield environment.timeout(arrives)
        yield from share.compute(work, lambda now: None)
        ended[number] = environment.now

    for number, (arrives, work) in enumerate(works):
        environment.process(job(number, arrives, work))
    environment.run()

    slices = 60  # of a second; every rate that occurs divides it
    left = {number: work * slices * 60 for number, (_, work) in enumerate(works)}
    tick, expected = 0, {}
    while left:
        active = [n for n in left if works[n][0] * slices <= tick]
        for number in active:
            left[number] -= 60 * min(cores, len(active)) // len(active)
        tick += 1
        for number in [n for n in active if left[n] <= 0]:
            expected[number] = tick / slices
            del left[number]
    assert ended.keys() == expected.keys()
    for number, end in ended.items():
        assert math.isclose(end, expected[number], abs_tol=len(works) / slices)


def test_a_slow_link_and_a_window_hold_on_shared_cores_too() -> None:
    """One receive at a time: the second transfer starts when 1F0 has used the first."""
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    network = Network(latency_s=5.0)
    trace = simulate(schedule, [_COST] * 2, network=network, cores=1, receive_window=1)
    assert trace.message_start_s.tolist() == [1, 6]
    assert trace.start_s.tolist() == [0, 1, 6, 11]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (2, 5), (3, 3), (4, 6)])
def test_speeds_of_a_common_gpu_have_a_closed_form(ranks: int, microbatches: int) -> None:
    """Forward in a pipeline of equal stages on one device: n ranks are at work in turn n, and each turn takes F / s_n.

    As the pipeline fills and drains there are two turns with n ranks for every n below p, and m - p + 1 with p.
    """
    speeds, forward_s = [1.0, 0.625, 0.5], 3.0
    cost = StageCost(forward_s=forward_s, backward_input_s=0.0, backward_weight_s=0.0)
    schedule = build_schedule("afab", ranks=ranks, microbatches=max(microbatches, ranks)).forward_only()
    trace = simulate(schedule, [cost] * ranks, sharing="fair", speeds=speeds)
    turn_s = [forward_s / speeds[min(count, len(speeds)) - 1] for count in range(1, ranks + 1)]
    expected_s = 2 * sum(turn_s[:-1]) + (schedule.microbatches - ranks + 1) * turn_s[-1]
    assert trace.makespan_s == pytest.approx(expected_s)


@given(data=st.data())
def test_speeds_generalise_cores_and_their_efficiency(data: st.DataObject) -> None:
    schedule = data.draw(schedules(least=2))
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    cores, efficiency = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1.0, 0.75, 0.4]))
    speeds = [min(1.0, efficiency * cores / count) for count in range(1, schedule.ranks + 1)]
    by_cores, by_speeds = (
        simulate(schedule, costs, network=network, sharing="fair", **how)
        for how in ({"cores": cores, "sharing_efficiency": efficiency}, {"speeds": speeds})
    )
    assert by_cores.start_s.tolist() == by_speeds.start_s.tolist()
    assert by_cores.end_s.tolist() == by_speeds.end_s.tolist()


def test_speeds_hold_on_each_device_by_itself() -> None:
    """Ranks 0 and 1 share a GPU, rank 2 has its own: 2F0 runs at full speed beside them."""
    schedule = build_schedule("afab", ranks=3, microbatches=3).forward_only()
    trace = simulate(schedule, [_COST] * 3, sharing="fair", devices=[0, 0, 1], speeds=[1.0, 0.5])
    assert trace.start_s.tolist() == [0, 1, 3, 1, 3, 5, 3, 5, 6]
    assert trace.end_s.tolist() == [1, 3, 5, 3, 5, 6, 4, 6, 7]


def test_the_compiled_engine_refuses_shared_devices_only() -> None:
    schedule = build_schedule("afab", ranks=2, microbatches=2)
    for how in ({"cores": 1}, {"devices": [0, 0]}, {"sharing": "fair", "speeds": [1.0, 0.5]}):
        with pytest.raises(ValueError, match=r"no shared devices .*: use engine='simpy'"):
            simulate(schedule, [_COST] * 2, engine="compiled", **how)
    alone_s = simulate(schedule, [_COST] * 2, engine="compiled").makespan_s
    for how in ({"cores": 2}, {"devices": [0, 1]}, {"sharing": "fair", "speeds": [1.0, 1.0]}):
        assert simulate(schedule, [_COST] * 2, engine="compiled", **how).makespan_s == alone_s


def test_a_row_without_length_does_not_end_before_it_starts() -> None:
    """Cause of a bug: its start was a sum of rounded times, its end the clock, an ulp earlier; nothing explained it."""
    nothing = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    schedule = build_schedule("afab", ranks=1, microbatches=3)
    trace = simulate(schedule, [nothing], dispatch_s=0.3125, sharing="fair", speeds=[0.75])
    assert (trace.end_s >= trace.start_s).all()
    attribute(trace)
