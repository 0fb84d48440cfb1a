"""Layer times against sums taken kernel by kernel, and against published formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ppsim import Execution, Machine, Transformer, named_machine, transformer_work
from ppsim.estimate.layer_times import LayerTable
from ppsim.estimate.work import Work
from tests.support.machine_costs import layer_costs

GPT = Transformer.gpt(layers=2, hidden=1024, heads=16, vocabulary=51_200, positions=1024)
QUICK_HOST = replace(named_machine("a100", fitted=False), launch_s=1e-6)


def _one_by_one(works: list[Work], machine: Machine) -> float:
    total = 0.0
    for work in works:
        if work.products:
            total += sum(float(machine.product_s(*shape)) for shape in work.products)
        elif work.flops:
            total += float(machine.fused_attention_s(work.flops))
        else:
            total += float(machine.moving_s(work.traffic_bytes))
    return total


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_a_layer_takes_the_sum_of_its_kernels(attention: str) -> None:
    execution = Execution(micro_batch_size=4, seq=1024, attention=attention)  # type: ignore[arg-type]
    works = transformer_work(GPT, execution)
    for cost, work in zip(layer_costs(works, execution, QUICK_HOST), works, strict=True):
        added = float(QUICK_HOST.moving_s(3 * work.parameter_bytes))
        assert cost.forward_s == pytest.approx(_one_by_one(work.forward_work, QUICK_HOST))
        assert cost.backward_weight_s == pytest.approx(_one_by_one(work.backward_weight_work, QUICK_HOST) + added)
        assert cost.full_backward_s == pytest.approx(cost.backward_input_s + cost.backward_weight_s)


def test_small_layers_take_the_hosts_launches() -> None:
    slow = replace(QUICK_HOST, launch_s=1e-3)
    execution = Execution(micro_batch_size=1, seq=64)
    works = transformer_work(GPT, execution)
    block = layer_costs(works, execution, slow)[1]
    assert block.forward_s == pytest.approx(1e-3 * len(works[1].forward_work))
    assert block.full_backward_s == pytest.approx(
        1e-3 * (len(works[1].backward_input_work) + len(works[1].backward_weight_work))
    )


def test_hosts_do_not_hide_collectives() -> None:
    """vTrain's steps on one node are the sum of both to 0.1 %. Cause of a bug: the longer one alone was taken."""
    slow = replace(QUICK_HOST, launch_s=1e-3)
    execution = Execution(micro_batch_size=1, seq=64, tp=2, split_vocabulary=True)
    works = transformer_work(GPT, execution)
    table = LayerTable([(works[1], execution)])
    host_s = float(slow.host_s(len(works[1].forward_work), 2))
    reduce_s = float(slow.all_reduce_s(64 * 1024 * 2, 2))
    assert table.seconds(slow).forward[0] == pytest.approx(host_s + 2 * reduce_s)
    assert table.seconds(slow).communication[0] == pytest.approx(4 * reduce_s)


def test_factors_make_layers_longer() -> None:
    execution = Execution(micro_batch_size=1, seq=64, tp=2, split_vocabulary=True)
    table = LayerTable([(work, execution) for work in transformer_work(GPT, execution)[:3]])
    plain, slower = table.seconds(QUICK_HOST), table.seconds(QUICK_HOST, np.array([1.0, 2.0, 1.0]))
    for name in ("forward", "backward_input", "backward_weight", "backward", "communication"):
        assert getattr(slower, name).tolist() == (getattr(plain, name) * [1, 2, 1]).tolist()


def test_tensor_parallel_collectives_are_paid_and_sequence_parallel_ones_move_as_much() -> None:
    """Korthikanti et al., 2022, section 4.2.2: an all-gather and a reduce-scatter move what an all-reduce does."""
    whole, cut = (
        Execution(micro_batch_size=8, seq=1024, tp=4, split_vocabulary=True, sequence_parallel=way)
        for way in (False, True)
    )
    machine = replace(QUICK_HOST, node_latency_s=1e-6)
    blocks = [(transformer_work(GPT, way)[1], way) for way in (whole, cut)]
    plain, sequence = LayerTable(blocks).seconds(machine).communication
    reduce_s = float(machine.all_reduce_s(8 * 1024 * 1024 * 2, 4))
    assert plain == pytest.approx(4 * reduce_s)
    assert sequence == pytest.approx(plain + 4 * machine.node_latency_s)  # two collectives instead of one


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_sequence_parallel_activations_are_the_published_ones(tp: int) -> None:
    """Korthikanti et al., 2022, equation 4: s b h / t (34 + 5 a s / h), here without the norms' statistics."""
    execution = Execution(
        micro_batch_size=2, seq=1024, tp=tp, attention="unfused", dropout=True, sequence_parallel=tp > 1
    )
    block = transformer_work(GPT, execution)[1]
    statistics = block.saved["statistics 1"] + block.saved["statistics 2"]
    held = sum(block.saved.values()) - statistics
    assert held == 1024 * 2 * 1024 * (34 + 5 * 16 * 1024 // 1024) // tp


def test_sequence_parallelism_needs_a_sequence_that_divides() -> None:
    with pytest.raises(ValueError, match="cuts seq 10 over tp 4 ranks"):
        Execution(micro_batch_size=1, seq=10, tp=4, sequence_parallel=True)


def test_a_softmax_that_fits_no_kernel_goes_through_five() -> None:
    """Megatron-LM's kernel takes four matrices of scores at a time; here a rank has two."""
    few, enough = (
        Execution(micro_batch_size=b, seq=1024, tp=8, attention="unfused", softmax_multiple=4) for b in (1, 2)
    )
    names = [operation.name for operation in transformer_work(GPT, few)[1].operations]
    assert names.count("cast") == 2
    assert "mask" in names
    assert len(transformer_work(GPT, few)[1].operations) == len(transformer_work(GPT, enough)[1].operations) + 4


def test_joint_projections_do_the_same_work_in_fewer_kernels() -> None:
    apart, joint = (Execution(micro_batch_size=1, seq=512, joint_projections=way) for way in (False, True))
    first, second = (transformer_work(GPT, way)[1] for way in (apart, joint))
    assert first.forward_flops == second.forward_flops
    assert len(first.operations) == len(second.operations) + 2


def test_a_float32_loss_keeps_four_bytes_of_each_logit() -> None:
    """Korthikanti et al., 2022, section 4.3: 4 s b v / t. Cause of a bug: float32's time, but memory of 16 bits."""
    narrow, wide = (
        Execution(micro_batch_size=2, seq=512, tp=4, split_vocabulary=True, float32_loss=way) for way in (False, True)
    )
    heads = [transformer_work(GPT, way)[-1] for way in (narrow, wide)]
    logits = 512 * 2 * 51_200 // 4
    assert [head.saved["log-probabilities"] for head in heads] == [2 * logits, 4 * logits]
    assert heads[1].activation_bytes - heads[0].activation_bytes == 2 * logits
