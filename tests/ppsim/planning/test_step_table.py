"""Whole steps against sums by hand and against the simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ppsim import (
    Network,
    TrainingStep,
    Transformer,
    build_schedule,
    named_machine,
    partition,
    predict_steps,
    simulate,
    transformer_work,
)
from ppsim.planning.step_table import OPTIMIZER_TRAFFIC_BYTES
from tests.support.machine_costs import layer_costs

GPT = Transformer.gpt(layers=8, hidden=1024, heads=16, vocabulary=51_200, positions=1024, tied=False)
A100 = named_machine("a100")


def test_one_rank_takes_its_layers_one_after_another_and_the_update() -> None:
    step = TrainingStep(model=GPT, seq=1024, micro_batch_size=4, microbatches=3)
    costs = layer_costs(transformer_work(GPT, step.execution), step.execution, A100)
    predicted = predict_steps([step], A100)
    update_s = OPTIMIZER_TRAFFIC_BYTES * GPT.parameters / (A100.bytes_per_s * A100.bandwidth_efficiency) + A100.kernel_s
    assert predicted.pipeline[0] == pytest.approx(3 * sum(cost.work_s for cost in costs))
    assert predicted.step[0] == pytest.approx(predicted.pipeline[0] + update_s)
    assert predicted.gradients[0] == predicted.tied[0] == predicted.tensor[0] == 0


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1), ("zb-v", 2)])
def test_a_pipeline_is_simulated(schedule: str, chunks: int) -> None:
    step = TrainingStep(
        model=GPT, seq=1024, micro_batch_size=2, microbatches=8, pp=4, schedule=schedule, stages_per_rank=chunks
    )
    costs = layer_costs(transformer_work(GPT, step.execution), step.execution, A100)
    blocks = list(step.stage_blocks)
    blocks[0] += 1
    blocks[-1] += 1
    stages = partition(costs, stages=step.stages, method=blocks)
    built = build_schedule(schedule, ranks=4, microbatches=8, stages_per_rank=chunks)
    network = Network(latency_s=A100.node_latency_s / 2, bytes_per_s=A100.node_bytes_per_s)
    assert predict_steps([step], A100).pipeline[0] == pytest.approx(
        simulate(built, stages, network=network).makespan_s, rel=1e-9
    )


def test_replicas_add_up_their_gradients() -> None:
    one = TrainingStep(model=GPT, seq=1024, micro_batch_size=2, microbatches=2)
    eight, hidden, cut = (
        replace(one, dp=8),
        replace(one, dp=8, overlap_gradients=1.0),
        replace(one, dp=8, sharding="optimizer"),
    )
    alone, summed, overlapped, sharded = predict_steps([one, eight, hidden, cut], A100).step
    reduce_s = float(A100.all_reduce_s(2 * GPT.parameters, 8))
    assert summed - alone == pytest.approx(reduce_s, rel=1e-6)
    assert alone <= overlapped < summed
    update_s = float(A100.moving_s(OPTIMIZER_TRAFFIC_BYTES * GPT.parameters))
    assert sharded - alone == pytest.approx(reduce_s + A100.node_latency_s - 7 / 8 * update_s, abs=A100.kernel_s)


def test_many_steps_are_timed_as_one_is() -> None:
    steps = [
        TrainingStep(model=GPT, seq=1024, micro_batch_size=b, microbatches=m, tp=t, pp=p, dp=d)
        for b, m, t, p, d in [(1, 4, 1, 2, 4), (2, 8, 2, 4, 1), (2, 8, 2, 4, 8), (4, 2, 8, 1, 2), (1, 4, 1, 2, 8)]
    ]
    together = predict_steps(steps, A100)
    for index, step in enumerate(steps):
        assert predict_steps([step], A100).step[0] == together.step[index]


def test_messages_cross_nodes_where_devices_do() -> None:
    small = TrainingStep(model=GPT, seq=1024, micro_batch_size=1, microbatches=4, pp=2)
    slow = replace(A100, network_latency_s=1e-2)
    within, across = predict_steps([small, replace(small, dp=8)], slow).pipeline
    assert across > within + 2e-2 - 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp": 16}, "8 blocks do not fill 16 stages"),
        ({"pp": 2, "blocks": (3, 4)}, r"blocks \(3, 4\) do not cut 8 blocks into 2 stages"),
        ({"tp": 3}, "tp 3 must divide heads"),
        ({"microbatches": 0}, "microbatches must be a whole number of 1 or more"),
        ({"overlap_gradients": 2.0}, "overlap_gradients must be a share"),
        # Cause of bugs: these were taken, and failed later or not at all.
        ({"seq": 2048}, "seq 2048 exceeds the model's 1024 positions"),
        ({"pp": 2, "stages_per_rank": 2}, r"1f1b has 1 stage\(s\) per rank, got stages_per_rank=2"),
        ({"pp": 2, "schedule": "zb-v"}, r"zb-v has 2 stage\(s\) per rank, got stages_per_rank=1"),
        ({"schedule": "foo"}, "unknown schedule 'foo'"),
        ({"recompute": "selective"}, "fused attention does not keep"),
    ],
)
def test_steps_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingStep(**{"model": GPT, "seq": 1024, "micro_batch_size": 1, "microbatches": 4, **changes})  # type: ignore[arg-type]


def test_a_vocabulary_is_padded_where_it_is_cut() -> None:
    step = TrainingStep(model=replace(GPT, vocabulary=50_257), seq=1024, micro_batch_size=1, microbatches=1, tp=4)
    assert step.padded_model.vocabulary == 50_688  # Megatron-LM's for tp 4
    assert replace(step, tp=1).padded_model.vocabulary == 50_257


def test_a_rate_for_elements_of_another_size_is_refused() -> None:
    """Cause of a bug: steps have 2-byte elements, and a machine's rate for others was taken for them."""
    step = TrainingStep(model=GPT, seq=1024, micro_batch_size=1, microbatches=1)
    with pytest.raises(ValueError, match="the rate of a100 is for elements of 4 bytes, and a layer's have 2"):
        predict_steps([step], replace(A100, dtype_bytes=4))


def test_a_step_says_its_stages_per_rank() -> None:
    """Cause of a bug: plans that differ in them alone had the same words."""
    step = TrainingStep(
        model=GPT, seq=1024, micro_batch_size=2, microbatches=4, pp=2, schedule="interleaved-1f1b", stages_per_rank=4
    )
    assert step.words == "tp 1, pp 2, dp 1, micro batch 2, interleaved-1f1b x 4, recompute none"
