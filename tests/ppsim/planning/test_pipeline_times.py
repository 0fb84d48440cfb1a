"""Pipelines of many steps against one simulation each, and memory against the simulated peak."""

from __future__ import annotations

import numpy as np
import pytest

from ppsim import Link, Network, StageCost, TrainingStep, Transformer, build_schedule, schedule_names, simulate
from ppsim.estimate.layer_work import transformer_work
from ppsim.planning.pipeline_times import pipeline_ends, pipeline_program
from ppsim.planning.step_memory import step_memory
from tests.support.named import ONE_WAY

GPT = Transformer.gpt(layers=8, hidden=64, heads=4, vocabulary=512, positions=64)


@pytest.mark.parametrize("name", schedule_names())
def test_ends_are_those_of_the_simulation(name: str) -> None:
    generator = np.random.default_rng(1)
    schedule = build_schedule(name, ranks=4, microbatches=8)
    chunks = schedule.stages // 4
    program = pipeline_program(name, 4, 8, chunks)
    forward, whole, inputs, weights = generator.uniform(0.5, 2.0, (4, 3, schedule.stages))
    occupied, latency = generator.uniform(0.0, 0.3, (2, 3, 4, 4))
    ends = pipeline_ends(program, np.stack([forward, whole, inputs, weights]), occupied, latency)
    for step in range(3):
        stages = [
            StageCost(
                forward_s=forward[step, s],
                backward_input_s=inputs[step, s],
                backward_weight_s=weights[step, s],
                backward_s=whole[step, s],
                output_bytes=1,
            )
            for s in range(schedule.stages)
        ]
        links = {
            (a, b): Link(latency_s=latency[step, a, b], gap_s=occupied[step, a, b])
            for a in range(4)
            for b in range(4)
            if a != b
        }
        trace = simulate(schedule, stages, network=Network(links=links))
        frame = trace.to_frame()
        computed = frame[frame.kind.isin(["F", "B", "I", "W"])].groupby("rank").end_s.max()
        assert ends[step] == pytest.approx(computed.to_numpy())


@pytest.mark.parametrize("name", ONE_WAY)
def test_activations_are_the_simulated_peak(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    chunks = schedule.stages // 4
    step = TrainingStep(
        model=GPT, seq=64, micro_batch_size=2, microbatches=8, pp=4, schedule=name, stages_per_rank=chunks
    )
    embedding, block, head = (transformer_work(GPT, step.execution)[index] for index in (0, 1, -1))
    stages = []
    for stage, blocks in enumerate(step.stage_blocks):
        layers = [embedding] * (stage == 0) + [block] * blocks + [head] * (stage == schedule.stages - 1)
        shared = sum(layer.output_bytes for layer in layers[:-1])
        stages.append(
            StageCost(
                forward_s=1,
                backward_input_s=1,
                backward_weight_s=1,
                activation_bytes=sum(layer.activation_bytes for layer in layers) - shared,
                weight_activation_bytes=sum(layer.weight_activation_bytes for layer in layers),
            )
        )
    trace = simulate(schedule, stages)
    assert step_memory(step).activations == pytest.approx(trace.peak_activation_bytes)


def test_what_a_rank_holds_besides() -> None:
    step = TrainingStep(model=GPT, seq=64, micro_batch_size=2, microbatches=8, pp=2, dp=4, sharding="optimizer")
    memory = step_memory(step)
    assert memory.parameters.sum() == 2 * (GPT.parameters + 512 * 64)  # the tied table stands on both ends
    assert memory.gradients == pytest.approx(memory.parameters)
    assert memory.optimizer == pytest.approx(memory.parameters / 2 * 12 / 4)
    assert memory.total == pytest.approx(
        sum(getattr(memory, name) for name in ("parameters", "gradients", "optimizer", "activations"))
        + memory.recomputed
        + memory.buffers
        + memory.reserved
    )


def test_full_recomputation_holds_one_block_at_a_time() -> None:
    plain, full = (
        step_memory(TrainingStep(model=GPT, seq=64, micro_batch_size=2, microbatches=1, recompute=how))
        for how in ("none", "full")
    )
    assert full.activations[0] < plain.activations[0]
    assert plain.recomputed[0] == 0
    block = transformer_work(GPT, TrainingStep(model=GPT, seq=64, micro_batch_size=2, microbatches=1).execution)[1]
    assert full.activations[0] + full.recomputed[0] == pytest.approx(
        plain.activations[0] - (GPT.layers - 1) * (block.activation_bytes - 2 * block.output_bytes)
    )


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "pp", "chunks", "samples", "gib"),
    [(6144, 48, 64, 1, 1, 4, 9.5625), (12288, 96, 96, 8, 3, 1, 12.35), (25600, 128, 160, 64, 1, 1, 26.56)],
)
def test_activations_are_the_published_ones(
    hidden: int, layers: int, heads: int, pp: int, chunks: int, samples: int, gib: float
) -> None:
    """Korthikanti et al., 2022, figure 1: 22B, 175B and 1T with sequence parallelism and selective recomputation."""
    model = Transformer.gpt(layers=layers, hidden=hidden, heads=heads, vocabulary=51_200, positions=2048)
    step = TrainingStep(
        model=model,
        seq=2048,
        micro_batch_size=samples,
        microbatches=max(64, pp) if pp > 1 else 1,
        tp=8,
        pp=pp,
        schedule="interleaved-1f1b" if chunks > 1 else "1f1b",
        stages_per_rank=chunks,
        recompute="selective",
        sequence_parallel=True,
        attention="unfused",
        dropout=True,
    )
    # The paper leaves out norms' statistics and, as the message of the next stage, a stage's output.
    assert gib * 2**30 <= step_memory(step).activations.max() <= 1.04 * gib * 2**30
