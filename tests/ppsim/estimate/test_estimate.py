"""Estimated costs are layer costs like any others."""

from __future__ import annotations

import dataclasses

import pytest

import ppsim
from ppsim import (
    Device,
    Execution,
    Link,
    build_schedule,
    estimate_costs,
    named_device,
    partition,
    search,
    simulate,
    transformer_work,
)
from ppsim.estimate.estimate import all_reduce_s
from tests.support.transformers import GPT

ONE = Device(flops_per_s=1.0, bytes_per_s=1e30)  # a FLOP is a second, memory is free
_SHAPE = {"micro_batch_size": 2, "seq": 4}


def test_with_free_memory_seconds_are_flops() -> None:
    for cost, work in zip(estimate_costs(GPT, ONE, **_SHAPE), transformer_work(GPT, Execution(**_SHAPE)), strict=True):
        assert cost.forward_s == pytest.approx(work.forward_flops)
        assert cost.full_backward_s == pytest.approx(work.backward_flops)


def test_with_free_products_seconds_are_bytes() -> None:
    """A block in fp32 by hand, m = 8 tokens, h = 8, f = 32, one operation after another."""
    tokens, hidden, width = 8, 8, 32
    linears = 4 * (2 * tokens * hidden + hidden**2) + 2 * (tokens * hidden + tokens * width + hidden * width)
    elements = 4 * tokens * hidden + linears + 4 * tokens * hidden + 2 * tokens * width + 6 * tokens * hidden
    statistics = 2 * 2 * 4  # a log-sum-exp for each sequence, head and row
    device = Device(flops_per_s=1e30, bytes_per_s=1.0)
    block = estimate_costs(GPT, device, **_SHAPE, dtype_bytes=4)[1]
    assert block.forward_s == 4 * (elements + statistics)


def test_layers_have_names() -> None:
    assert [cost.name for cost in estimate_costs(GPT, ONE, **_SHAPE)] == ["embedding", "block 0", "block 1", "head"]


def test_tensor_parallel_blocks_wait_for_two_all_reduces_each_way() -> None:
    link = Link(latency_s=1.0, bytes_per_s=8.0)
    stream = 2 * 4 * 8 * 2
    reduce_s = 2 * (2 - 1) * (1.0 + stream / 2 / 8.0)
    assert all_reduce_s(stream, 2, link) == reduce_s
    free = estimate_costs(GPT, ONE, **_SHAPE, tp=2)
    paid = estimate_costs(GPT, ONE, **_SHAPE, tp=2, tp_link=link)
    full = estimate_costs(GPT, ONE, **_SHAPE, tp=2, tp_link=link, recompute="full")
    assert paid[0] == free[0]
    assert paid[-1] == free[-1]
    for before, after, again in zip(free[1:-1], paid[1:-1], full[1:-1], strict=True):
        assert after.forward_s - before.forward_s == pytest.approx(2 * reduce_s)
        assert after.backward_input_s - before.backward_input_s == pytest.approx(2 * reduce_s)
        assert after.backward_weight_s == before.backward_weight_s
        assert again.backward_input_s == pytest.approx(after.backward_input_s + after.forward_s)


def test_whole_layers_have_no_link() -> None:
    assert estimate_costs(GPT, ONE, **_SHAPE, tp_link=Link(latency_s=9)) == estimate_costs(GPT, ONE, **_SHAPE)


def test_rates_are_for_elements_of_one_size() -> None:
    with pytest.raises(ValueError, match="the rate of h100 is for elements of 2 bytes, dtype_bytes is 4"):
        estimate_costs(GPT, named_device("h100"), **_SHAPE, dtype_bytes=4)


def test_costs_are_partitioned_simulated_and_searched() -> None:
    layers = estimate_costs(dataclasses.replace(GPT, layers=6), named_device("h100"), **_SHAPE)
    stages = partition(layers, stages=4, method="optimal")
    schedule = build_schedule("zb-h1", ranks=4, microbatches=4)
    trace = simulate(schedule, stages)
    assert trace.makespan_s >= 4 * max(stage.work_s for stage in stages)
    found = search(stages, ranks=4, microbatches=4, memory_limit_bytes=int(trace.peak_activation_bytes.max()))
    assert found.lower_bound_s <= found.trace.makespan_s * (1 + 1e-12)


def test_full_recomputation_trades_time_for_memory() -> None:
    plain, full = (estimate_costs(GPT, ONE, **_SHAPE, recompute=how)[1] for how in ("none", "full"))
    stream = 2 * 4 * 8 * 2
    assert full.activation_bytes == 2 * stream < plain.activation_bytes
    assert full.full_backward_s == pytest.approx(plain.full_backward_s + plain.forward_s)


def test_sequence_parallel_layers_hold_a_share_of_the_stream() -> None:
    """Blocks hold s b h (34 + 5 a s / h) / t bytes, Korthikanti et al., 2022, equation 4; norms' statistics besides."""
    gpt = ppsim.Transformer.gpt(layers=1, hidden=1024, heads=16, vocabulary=50_304, positions=512)
    device = ppsim.named_device("a100")
    words = {"micro_batch_size": 2, "seq": 512, "tp": 4, "attention": "unfused", "dropout": True}
    whole, cut = (ppsim.estimate_costs(gpt, device, sequence_parallel=way, **words)[1] for way in (False, True))
    formula = 512 * 2 * 1024 * (34 + 5 * 16 * 512 / 1024) / 4
    held = cut.activation_bytes - cut.output_bytes
    assert held == pytest.approx(formula, rel=0.01)
    assert cut.output_bytes == whole.output_bytes / 4
    assert cut.forward_s < whole.forward_s
