"""Steps of replicas whose schedules differ: closed forms, and sums that wait for the last replica."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Collectives,
    InputError,
    Jitter,
    Reduction,
    Schedule,
    StageCost,
    attribute,
    build_schedule,
    monte_carlo,
    schedule_names,
    simulate,
    simulate_replicas,
)
from tests.support.strategies import networks, stage_costs

NAMES = [name for name in schedule_names() if name not in ("dualpipe", "chimera")]
RING = Reduction(replicas=2, latency_s=0.25, bytes_per_s=4.0)


def cost(forward_s: float = 1.0, backward_s: float = 2.0, parameter_bytes: int = 8) -> StageCost:
    return StageCost(forward_s=forward_s, backward_input_s=backward_s / 2, backward_weight_s=backward_s / 2,
                     parameter_bytes=parameter_bytes)  # fmt: skip


def of(name: str, ranks: int, *counts: int) -> list[Schedule]:
    return [build_schedule(name, ranks=ranks, microbatches=count) for count in counts]


@given(
    ranks=st.integers(1, 5),
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    ratio=st.sampled_from([1, 2, 3]),
)
def test_with_free_sums_a_step_of_1f1b_is_that_of_the_most_microbatches(
    ranks: int, counts: list[int], ratio: int
) -> None:
    """(m + p - 1)(F + B) of the largest m; each replica computes as if it were alone."""
    traces = simulate_replicas(of("1f1b", ranks, *counts), [cost(1.0, float(ratio))] * ranks)
    for count, trace in zip(counts, traces, strict=True):
        assert trace.makespan_s == (count + ranks - 1) * (1 + ratio)
        assert trace.step_s == (max(counts) + ranks - 1) * (1 + ratio)


@pytest.mark.parametrize(("ranks", "counts"), [(1, (3, 1)), (4, (9, 2)), (3, (2, 2, 7))])
def test_a_ring_makes_the_step_longer_by_the_sum_of_the_first_stage(ranks: int, counts: tuple[int, ...]) -> None:
    """1F1B ends on rank 0, one backward after rank 1: a sum of 2 s or less on rank 1 is over by then."""
    ring = Reduction(replicas=len(counts), bytes_per_s=8.0)
    taken_s = ring.seconds(8)
    assert taken_s <= 2
    for trace in simulate_replicas(of("1f1b", ranks, *counts), [cost()] * ranks, reduction=ring):
        end_s = (max(counts) + ranks - 1) * 3
        assert trace.reduce_start_s.tolist() == [end_s - 2 * stage for stage in range(ranks)]
        assert trace.step_s == end_s + taken_s


@given(st.data())
def test_a_sum_starts_when_the_last_replica_is_ready(data: st.DataObject) -> None:
    """Stage by stage from the traces of the replicas alone; what they compute and wait for stays as it was."""
    name, ranks = data.draw(st.sampled_from(NAMES)), data.draw(st.integers(1, 4))
    schedules = of(name, ranks, *data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3)))
    costs, network = data.draw(stage_costs(schedules[0].stages)), data.draw(networks(ranks))
    ring = Reduction(replicas=len(schedules), latency_s=0.25, bytes_per_s=4.0)
    alone = [simulate(schedule, costs, network=network) for schedule in schedules]
    traces = simulate_replicas(schedules, costs, network=network, reduction=ring, engine="compiled")
    frames = [trace.to_frame() for trace in alone]
    ready = np.array(
        [
            [frame[(frame.stage == stage) & frame.kind.isin(["B", "W"])].end_s.max() for stage in range(len(costs))]
            for frame in frames
        ]
    ).max(axis=0)
    free, begin = dict.fromkeys(range(ranks), 0.0), {}
    for stage in sorted(range(len(costs)), key=lambda stage: (ready[stage], stage)):
        rank = schedules[0].placement[stage]
        begin[stage] = max(ready[stage], free[rank])
        free[rank] = begin[stage] + ring.seconds(costs[stage].trained_bytes)
    for plain, trace in zip(alone, traces, strict=True):
        assert trace.start_s.tolist() == plain.start_s.tolist()
        assert trace.end_s.tolist() == plain.end_s.tolist()
        assert trace.reduce_start_s.tolist() == [begin[stage] for stage in range(len(costs))]
        assert trace.step_s == max(trace.makespan_s, max(free.values()) - trace.start_s.min())
        found = attribute(trace)
        assert np.allclose(sum(found.parts_s.values()), trace.bubble_s)
        again = simulate(trace.schedule, costs, network=network, conditions=trace.conditions)
        assert again.to_frame().equals(trace.to_frame())


def test_equal_replicas_are_one_that_is_simulated_alone() -> None:
    (schedule,) = of("zb-v", 2, 4)
    plain = simulate(schedule, [cost()] * 4, reduction=RING)
    one, other = simulate_replicas([schedule] * 2, [cost()] * 4, reduction=RING)
    assert one is other
    assert one.to_frame().equals(plain.to_frame())


def test_replicas_may_differ_in_more_than_microbatches() -> None:
    """A straggler in one replica delays the sums of all: by hand, with one microbatch on one rank."""
    schedule, slow = of("1f1b", 1, 1), {0: 4.0}
    late = simulate(schedule[0], [cost()], slow_ranks=slow)
    trace = simulate(schedule[0], [cost()], reduction=RING, gradients_ready_s=[late.makespan_s])
    assert (trace.makespan_s, trace.reduce_start_s.tolist(), trace.step_s) == (3.0, [12.0], 12.0 + RING.seconds(8))


def test_samples_wait_for_the_others_too() -> None:
    (schedule,) = of("1f1b", 2, 3)
    options: dict[str, Any] = {"reduction": RING, "gradients_ready_s": [100.0, 0.0], "jitter": Jitter(action=0.1)}
    found = monte_carlo(schedule, [cost()] * 2, samples=20, **options)
    assert found.step_s == pytest.approx([100.0 + RING.seconds(8)] * 20)
    assert found.trace(7).step_s == found.step_s[7]
    assert (found.makespan_s < 20).all()


def test_an_evaluation_reduces_nothing() -> None:
    traces = simulate_replicas([s.forward_only() for s in of("1f1b", 2, 4, 2)], [cost()] * 2, reduction=RING)
    assert [trace.step_s for trace in traces] == [5.0, 3.0]
    assert all(trace.reduce_end_s is None for trace in traces)


def test_copies_of_the_model_wait_for_all_replicas() -> None:
    """Chimera on two ranks, which both hold both stages of the model: each sum is of two copies on two replicas."""
    schedules, costs = of("chimera", 2, 4, 2), [cost(), cost(2.0)]
    ready = [0.0, 0.0]
    for plain in (simulate(schedule, costs) for schedule in schedules):
        for stage in range(4):
            ready[stage % 2] = max(ready[stage % 2], plain.end_s[list(plain.program.stage == stage)].max())
    taken_s = Reduction(replicas=4, latency_s=0.25, bytes_per_s=4.0).seconds(8)
    first, second = sorted(ready)
    begin = {first: first, second: max(second, first + taken_s)}
    for trace in simulate_replicas(schedules, costs, reduction=RING):
        assert trace.reduce_start_s.tolist() == [begin[ready[stage % 2]] for stage in range(4)]
        assert (trace.reduce_end_s - trace.reduce_start_s).tolist() == [taken_s] * 4


@pytest.mark.parametrize(
    ("schedules", "options", "message"),
    [
        ([], {}, "there are no replicas"),
        (of("1f1b", 2, 4) + of("1f1b", 4, 4), {}, "ranks is 4 of replica 1 and 2 of replica 0"),
        (of("interleaved-1f1b", 2, 4) + of("zb-v", 2, 4), {}, "placement is"),
        ([*of("1f1b", 2, 4), of("1f1b", 2, 4)[0].forward_only()], {}, "is_forward_only is True of replica 1"),
        (of("1f1b", 2, 4, 3), {"reduction": Reduction(replicas=3)}, "give it replicas=2"),
        (of("1f1b", 2, 4, 3), {"collectives": Collectives(replicas=2)}, "wherever they gather parameters"),
    ],
)
def test_what_is_no_step_of_replicas_is_refused(
    schedules: list[Schedule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        simulate_replicas(schedules, [cost()] * 2, **options)


def test_numbers_for_other_stages_are_refused() -> None:
    (schedule,) = of("1f1b", 2, 3)
    with pytest.raises(InputError, match=r"one number for each of 2 stages, got the shape \(3,\)"):
        simulate(schedule, [cost()] * 2, reduction=RING, gradients_ready_s=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="gradients_ready_s is what a reduction waits for"):
        simulate(schedule, [cost()] * 2, gradients_ready_s=[1.0, 2.0])
