"""Overlapped pairs of stages that communicate: two streams, one part's communication under the other's compute."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import LayerCost, Schedule, StageCost, build_schedule, load_costs, partition, save_costs, simulate
from ppsim.costs.recompute import recompute_layers
from ppsim.schedule.action import Kind
from tests.support.evaluator import evaluate, spelled
from tests.support.strategies import exact_seconds, networks, schedules, stage_costs

# One pair of four layers of DeepSeek-V3 on H800: sums of annotated ranges of deepseek-ai/profile-data, train.json.
# Kernels were timed while they ran side by side.
DEEPSEEK_PAIR_MS = 129.0
DEEPSEEK = StageCost(
    forward_s=35.9e-3,
    forward_communication_s=61.5e-3,
    backward_input_s=111.6e-3 - 53.0e-3,
    backward_input_communication_s=53.0e-3,
    backward_weight_s=29.8e-3,
)


def test_deepseek_s_published_pair() -> None:
    """Serial it would be 238.8 ms."""
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"]])
    paired = Schedule.from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n")
    serial_ms, paired_ms = (1e3 * simulate(each, [DEEPSEEK]).makespan_s for each in (schedule, paired))
    forward_ms, backward_ms = 35.9 + 61.5, 111.6 + 29.8
    assert serial_ms == pytest.approx(2 * (forward_ms + backward_ms))
    pair_ms = paired_ms - forward_ms - backward_ms
    assert pair_ms == pytest.approx(35.9 + 111.6 - 53.0 + 29.8)
    assert pair_ms == pytest.approx(DEEPSEEK_PAIR_MS, rel=0.05)


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
@given(data=st.data())
def test_any_step_with_pairs_is_as_a_second_evaluator_has_it(engine: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    costs = [
        dataclasses.replace(
            cost,
            forward_communication_s=data.draw(exact_seconds()),
            backward_input_communication_s=data.draw(exact_seconds()),
            backward_weight_communication_s=data.draw(exact_seconds()),
            backward_communication_s=data.draw(st.none() | exact_seconds()),
        )
        for cost in data.draw(stage_costs(schedule.stages))
    ]
    network, overlap = data.draw(networks(schedule.ranks)), data.draw(st.sampled_from([1.0, 0.75]))
    trace = simulate(schedule, costs, network=network, overlap=overlap, engine=engine)
    answer = evaluate(spelled(schedule), schedule.placement, costs, network, overlap)
    assert trace.makespan_s == pytest.approx(float(answer.makespan), rel=1e-12, abs=1e-12)


def test_communication_adds_up_over_layers_and_survives_files(tmp_path) -> None:
    one = LayerCost(name="a", forward_s=1, backward_input_s=2, backward_weight_s=3, forward_communication_s=4,
                    backward_input_communication_s=5, backward_weight_communication_s=6)  # fmt: skip
    two = dataclasses.replace(one, name="b", backward_communication_s=7.0)
    (stage,) = partition([one, two], stages=1)
    assert [stage.communication_s[kind] for kind in "FIWB"] == [8, 10, 12, 18]
    assert stage.work_s == 2 + 8 + 10 + 18
    for ending in ("json", "csv"):
        save_costs([one, two], tmp_path / f"costs.{ending}")
        assert load_costs(tmp_path / f"costs.{ending}") == [one, two]


def test_a_recomputed_layer_communicates_again() -> None:
    layer = LayerCost(forward_s=1, backward_input_s=2, backward_weight_s=3, forward_communication_s=4,
                      backward_input_communication_s=5)  # fmt: skip
    (again,) = recompute_layers([layer])
    assert [again.alone_s[kind] for kind in "FIWB"] == [5, 7 + 5, 3, 10 + 5]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_pairs_hide_communication_in_the_steady_state(chunks: int) -> None:
    """A rank idles only while the pipeline fills and empties: what a microbatch more costs is v pairs."""
    ranks, name = 4, "interleaved-1f1b-overlap"
    costs = [DEEPSEEK] * (ranks * chunks)
    few, many = (
        simulate(build_schedule(name, ranks=ranks, microbatches=m, stages_per_rank=chunks), costs).makespan_s
        for m in (4 * ranks, 8 * ranks)
    )
    pair_s = DEEPSEEK.forward_s + DEEPSEEK.full_backward_s
    assert many - few == pytest.approx(4 * ranks * chunks * pair_s)


def test_one_stage_per_rank_is_a_schedule_of_its_own() -> None:
    one = build_schedule("1f1b-overlap", ranks=3, microbatches=7)
    same = build_schedule("interleaved-1f1b-overlap", ranks=3, microbatches=7, stages_per_rank=1)
    assert one.orders == same.orders
    first_backward = [int(np.argmax(order.kind == Kind.B)) for order in one.orders]
    assert first_backward == [6, 4, 2]  # 2 (p - 1 - rank) + 1 forwards ahead, and the first pair's own
