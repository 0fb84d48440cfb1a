"""Steps and plans of models whose blocks differ and whose experts are dealt out, against simulation and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import ppsim
from ppsim import (
    Choices,
    Cluster,
    Experts,
    LatentAttention,
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
from ppsim.planning.candidates import balanced_runs, candidates
from ppsim.planning.framework_flags import megatron_flags
from ppsim.planning.step_memory import step_memory
from tests.support.machine_costs import layer_costs

MIXED = Transformer(
    layers=9,
    hidden=1024,
    intermediate=4096,
    heads=16,
    kv_heads=16,
    head_dim=96,
    vocabulary=51_200,
    gated=True,
    norm="rmsnorm",
    latent=LatentAttention(kv_rank=256, query_rank=384, nope_dim=64, rope_dim=32, value_dim=64),
    experts=Experts(count=16, active=4, intermediate=512, shared_intermediate=512),
    dense_blocks=(0, 1),
)
A100 = named_machine("a100")
STEP = TrainingStep(model=MIXED, seq=1024, micro_batch_size=2, microbatches=8)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-v", 2)])
def test_stages_take_what_their_own_blocks_take(schedule: str, chunks: int) -> None:
    step = replace(STEP, pp=4, schedule=schedule, stages_per_rank=chunks, ep=1)
    costs = layer_costs(transformer_work(MIXED, step.execution), step.execution, A100)
    sizes = list(step.stage_blocks)
    sizes[0] += 1
    sizes[-1] += 1
    stages = partition(costs, stages=step.stages, method=sizes)
    built = build_schedule(schedule, ranks=4, microbatches=8, stages_per_rank=chunks)
    network = Network(latency_s=A100.node_latency_s / 2, bytes_per_s=A100.node_bytes_per_s)
    trace = simulate(built, stages, network=network)
    assert predict_steps([step], A100).pipeline[0] == pytest.approx(trace.makespan_s, rel=1e-9)
    # The head's logits count in the last stage, as no stage comes after it.
    held = simulate(built, [replace(each, output_bytes=0) for each in stages]).peak_activation_bytes
    assert step_memory(step).activations == pytest.approx(held, rel=1e-9)


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "expert_tp"), [(1, 4, 2, None), (1, 4, 4, None), (2, 4, 8, 1), (2, 2, 2, 2)]
)
def test_ranks_hold_each_parameter_as_often_as_it_has_copies(tp: int, dp: int, ep: int, expert_tp: int | None) -> None:
    step = replace(STEP, tp=tp, dp=dp, pp=3, ep=ep, expert_tp=expert_tp, sequence_parallel=True)
    experts = 7 * 16 * MIXED.blocks[2].expert_parameters(1)
    copies = step.expert_replicas
    # Of all ranks of a stage together.
    assert tp * dp * step.rank_expert_parameters.sum() == copies * experts
    if tp == 1:
        others = (step.rank_parameters - step.rank_expert_parameters).sum()
        assert others == MIXED.parameters - experts
    cut = step_memory(replace(step, sharding="optimizer")).optimizer.sum() / 12
    rest = step.rank_parameters.sum() - step.rank_expert_parameters.sum()
    assert cut == pytest.approx(rest / dp + step.rank_expert_parameters.sum() / copies)


def test_experts_dealt_over_all_replicas_have_no_gradients_to_add_up() -> None:
    whole, dealt = (predict_steps([replace(STEP, dp=8, ep=ep)], A100) for ep in (1, 8))
    dense = MIXED.parameters - 7 * 16 * MIXED.blocks[2].expert_parameters(1)
    experts = MIXED.parameters - dense
    reduce_s = float(A100.all_reduce_s(2 * dense, 8))
    assert dealt.gradients[0] == pytest.approx(reduce_s, rel=1e-6)
    assert whole.gradients[0] == pytest.approx(reduce_s + float(A100.all_reduce_s(2 * experts, 8)), rel=1e-6)
    # Seven blocks with experts, two exchanges each in F and in B, of 8 microbatches.
    sent = 2 * 1024 * 4 * 1024 * 2
    assert dealt.experts[0] == pytest.approx(8 * 7 * 4 * float(A100.all_to_all_s(sent, 8)))
    assert whole.experts[0] == 0
    assert dealt.tensor[0] == 0


def test_steps_of_models_with_other_kinds_are_timed_together_as_alone() -> None:
    gpt = Transformer.gpt(layers=9, hidden=1024, heads=16, vocabulary=51_200, positions=1024)
    steps = [replace(STEP, pp=3), replace(STEP, model=gpt, pp=3), replace(STEP, pp=3, dp=2, ep=2)]
    together = predict_steps(steps, A100)
    for index, step in enumerate(steps):
        assert predict_steps([step], A100).step[0] == together.step[index]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_balanced_runs_are_the_best_of_all(stages: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    loads, (first, last) = tuple(draw.uniform(0.5, 3, 7).tolist()), draw.uniform(0, 3, 2).tolist()

    def slowest(counts: tuple[int, ...]) -> float:
        ends = list(itertools.accumulate(counts))
        sums = [sum(loads[end - count : end]) for end, count in zip(ends, counts, strict=True)]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    every = [each for each in itertools.product(range(8), repeat=stages) if sum(each) == 7]
    found = balanced_runs(loads, stages, first, last)
    assert sum(found) == 7
    assert slowest(found) == pytest.approx(min(map(slowest, every)))


def test_a_plan_deals_experts_out_where_they_do_not_fit() -> None:
    large = replace(MIXED, layers=12, experts=Experts(count=64, active=4, intermediate=4096))
    plans = ppsim.plan(
        large,
        Cluster(machine=named_machine("a100-40gb"), devices=16),
        global_batch=64,
        seq=1024,
        choices=Choices(schedules=("1f1b",), micro_batch_sizes=(1, 2)),
    )
    best = plans.best
    assert best.step.ep > 1
    assert best.parts_s["experts"] > 0
    assert sum(best.parts_s.values()) == pytest.approx(best.step_s)
    assert f"ep {best.step.ep}" in best.step.words
    assert f"--expert-model-parallel-size {best.step.ep}" in megatron_flags(best.step)
    whole = [each for each in plans.losers if each.step.ep == 1 and each.step.pp == 1]
    assert whole
    assert all("GB more than 40.0 GB" in each.reason for each in whole)


def test_ways_to_deal_out_experts_divide_them_and_the_ranks() -> None:
    choices = Choices(schedules=("1f1b",), micro_batch_sizes=(1,), recompute=("none",))
    cluster = Cluster(machine=A100, devices=16)
    found = list(candidates(MIXED, cluster, seq=1024, global_batch=64, choices=choices))
    assert {step.ep for step in found} == {1, 2, 4, 8, 16}
    assert all(step.tp * step.dp % step.ep == 0 and step.expert_tp == 1 for step in found)
    chosen = list(candidates(MIXED, cluster, seq=1024, global_batch=64, choices=replace(choices, ep=(4, 3))))
    assert {step.ep for step in chosen} == {4}
    gpt = Transformer.gpt(layers=8, hidden=1024, heads=16, vocabulary=51_200, positions=1024)
    assert {step.ep for step in candidates(gpt, cluster, seq=1024, global_batch=64, choices=choices)} == {1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ep": 2}, "ep 2 x expert_tp 1 = 2 ranks for experts must divide the 1 ranks of a pipeline stage"),
        ({"ep": 3, "dp": 3}, "ep 3 must divide the count of experts 16"),
        ({"model": replace(MIXED, mtp_layers=1)}, "layers that predict further tokens are not modelled"),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(STEP, **changes)  # type: ignore[arg-type]


def test_context_parallel_ranks_share_sequences_and_add_up_gradients() -> None:
    gpt = Transformer.gpt(layers=8, hidden=1024, heads=16, vocabulary=51_200, positions=8192)
    step = TrainingStep(model=gpt, seq=8192, micro_batch_size=1, microbatches=4, cp=4)
    whole = replace(step, cp=1)
    assert (step.devices, step.global_batch) == (4, whole.global_batch)
    assert step.rank_parameters.tolist() == whole.rank_parameters.tolist()
    assert step_memory(step).activations * 4 == pytest.approx(step_memory(whole).activations, rel=1e-6)
    four = replace(whole, dp=4)
    seconds = predict_steps([step, whole, four], A100)
    assert seconds.gradients[0] == pytest.approx(seconds.gradients[2])
    assert seconds.busy[1] / 4 < seconds.busy[0] < seconds.busy[1]
    choices = Choices(schedules=("1f1b",), micro_batch_sizes=(1,), recompute=("none",), cp=(1, 2, 3))
    cluster = Cluster(machine=A100, devices=16)
    found = list(candidates(gpt, cluster, seq=8192, global_batch=64, choices=choices))
    assert {each.cp for each in found} == {1, 2}
    assert all(each.devices == 16 for each in found)
    assert "--context-parallel-size 2" in megatron_flags(next(each for each in found if each.cp == 2))
