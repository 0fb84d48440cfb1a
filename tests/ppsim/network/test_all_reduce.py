"""Reductions over replicas: the ring's closed form, and when each starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Reduction, StageCost, Trace, build_schedule, simulate
from tests.support.strategies import networks, schedules, stage_costs


def test_a_ring_sends_each_part_round_twice() -> None:
    """Four replicas, 8 bytes at 1 byte/s: 2 x 3 rounds of 2 s and 0.5 s latency."""
    assert Reduction(replicas=4, latency_s=0.5, bytes_per_s=1).seconds(8) == 15
    assert Reduction(replicas=1, latency_s=0.5, bytes_per_s=1).seconds(8) == 0


@given(st.data())
def test_each_starts_with_its_stages_last_backward_one_after_another(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    reduction = Reduction(replicas=data.draw(st.integers(2, 4)), latency_s=0.25, bytes_per_s=4.0)
    plain = simulate(schedule, costs, network=network)
    trace = simulate(schedule, costs, network=network, reduction=reduction)
    assert np.array_equal(plain.end_s, trace.end_s)
    frame = trace.to_frame()
    rows = frame[frame.kind == "REDUCE_GRAD"]
    assert sorted(rows.stage) == list(range(schedule.stages))
    for rank, of_rank in rows.groupby("rank"):
        free = 0.0
        for row in of_rank.sort_values("start_s").itertuples():
            assert schedule.placement[row.stage] == rank
            backwards = frame[(frame.stage == row.stage) & frame.kind.isin(["B", "W"])]
            assert row.start_s == max(backwards.end_s.max(), free)
            assert row.end_s == row.start_s + reduction.seconds(costs[row.stage].parameter_bytes)
            free = row.end_s
    assert trace.step_s == max(trace.makespan_s, rows.end_s.max() - trace.start_s.min())


def test_a_trace_keeps_its_reductions(tmp_path: Path) -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=8)
    reduction = Reduction(replicas=2, bytes_per_s=1.0)
    trace = simulate(build_schedule("1f1b", ranks=2, microbatches=2), [cost] * 2, reduction=reduction)
    trace.save(tmp_path / "trace.npz")
    back = Trace.load(tmp_path / "trace.npz")
    assert back.step_s == trace.step_s > trace.makespan_s
    assert back.to_frame().equals(trace.to_frame())


def test_an_evaluation_and_a_single_replica_reduce_nothing() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=8)
    schedule = build_schedule("1f1b", ranks=2, microbatches=2)
    assert simulate(schedule, [cost] * 2, reduction=Reduction(replicas=1)).reduce_end_s is None
    assert simulate(schedule.forward_only(), [cost] * 2, reduction=Reduction(replicas=2)).reduce_end_s is None


@pytest.mark.parametrize(
    "options", [{"replicas": 0}, {"replicas": 2, "latency_s": -1}, {"replicas": 2, "bytes_per_s": 0}]
)
def test_bad_numbers_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        Reduction(**options)


@given(
    replicas=st.integers(2, 8),
    latency_s=st.floats(1e-6, 1e-2),
    bytes_per_s=st.floats(1e6, 1e11),
    sizes=st.lists(st.integers(1, 10**9), min_size=2, max_size=6, unique=True),
)
def test_a_fit_gives_the_ring_back_that_made_the_times(
    replicas: int, latency_s: float, bytes_per_s: float, sizes: list[int]
) -> None:
    ring = Reduction(replicas=replicas, latency_s=latency_s, bytes_per_s=bytes_per_s)
    times = [ring.seconds(size) for size in sizes]
    fitted = Reduction.fitted(replicas, sizes, times)
    assert [fitted.seconds(size) for size in sizes] == pytest.approx(times, rel=1e-6)


def test_what_cannot_be_told_apart_or_would_be_negative_is_left_out() -> None:
    alone = Reduction.fitted(2, [1000, 1000], [0.2, 0.2])  # one size: all of it latency or all of it bytes
    assert alone.seconds(1000) == pytest.approx(0.2)
    cheaper = Reduction.fitted(2, [1000, 2000], [0.2, 0.1])
    assert (cheaper.latency_s > 0, cheaper.bytes_per_s) == (True, np.inf)
    steeper = Reduction.fitted(2, [1000, 2000], [0.1, 0.4])
    assert (steeper.latency_s, steeper.bytes_per_s < np.inf) == (0, True)
    assert Reduction.fitted(2, [0], [0.2]).seconds(0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, [1], [1.0]), "replicas must be 2 or more"),
        ((2, [], []), "lists of one length"),
        ((2, [1, 2], [1.0]), "lists of one length"),
        ((2, [1], [0.0]), "seconds finite and > 0"),
        ((2, [-1], [1.0]), "size_bytes must be finite"),
    ],
)
def test_a_fit_of_nothing_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction.fitted(*arguments)


def test_weights_that_are_not_trained_are_not_reduced() -> None:
    costs = [
        StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=8, gradient_bytes=trained)
        for trained in (None, 2)
    ]
    trace = simulate(
        build_schedule("1f1b", ranks=2, microbatches=2), costs, reduction=Reduction(replicas=2, bytes_per_s=1.0)
    )
    assert trace.reduce_bytes is not None
    assert trace.reduce_start_s is not None
    assert trace.reduce_end_s is not None
    assert trace.reduce_bytes.tolist() == [8, 2]
    assert (trace.reduce_end_s - trace.reduce_start_s).tolist() == [8, 2]
