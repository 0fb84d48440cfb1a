"""Bytes and seconds of experts and latent attention, against PyTorch's autograd and closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

import ppsim
from ppsim import (
    Device,
    Execution,
    Experts,
    LatentAttention,
    Link,
    Machine,
    Transformer,
    estimate_costs,
    transformer_work,
)
from ppsim.estimate.attention_work import attention_part
from ppsim.estimate.feed_forward_work import feed_forward_part
from ppsim.estimate.layer_times import LayerTable

LATENT = LatentAttention(kv_rank=12, query_rank=20, nope_dim=8, rope_dim=8, value_dim=16)
MIXED = Transformer(
    layers=4,
    hidden=32,
    intermediate=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    vocabulary=48,
    gated=True,
    norm="rmsnorm",
    latent=LATENT,
    experts=Experts(count=8, active=2, intermediate=24, shared_intermediate=40),
    dense_blocks=(0,),
)
PLAIN = dataclasses.replace(MIXED, latent=None, experts=dataclasses.replace(MIXED.experts, shared_intermediate=0))
ONE = Device(flops_per_s=1.0, bytes_per_s=1e30)  # a FLOP is a second, memory is free


class _Saved:
    """Bytes of each storage that autograd saves, without parameters and without what is named beside it."""

    def __init__(self, *without: torch.Tensor) -> None:
        self._without = {each.untyped_storage().data_ptr() for each in without}
        self.bytes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._without:
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)  # so that no other storage takes its place
        return tensor


def _saved_bytes(run: object, *without: torch.Tensor) -> int:
    saved = _Saved(*without)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda each: each):
        run()  # type: ignore[operator]
    return sum(saved.bytes.values())


def test_latent_attention_saves_what_autograd_keeps() -> None:
    """Written from DeepSeek-V2, 2024, equations 9 to 19, with the fused kernel of PyTorch."""
    torch.manual_seed(0)
    batch, seq, hidden, heads = 2, 16, MIXED.hidden, MIXED.heads
    tokens = batch * seq
    shapes = {
        "q_down": (LATENT.query_rank, hidden),
        "q_up": (heads * 16, LATENT.query_rank),
        "kv_down": (LATENT.kv_rank + LATENT.rope_dim, hidden),
        "kv_up": (heads * (LATENT.nope_dim + LATENT.value_dim), LATENT.kv_rank),
        "out": (hidden, heads * LATENT.value_dim),
    }
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    gains = [nn.Parameter(torch.ones(size)) for size in (LATENT.query_rank, LATENT.kv_rank)]
    stream = torch.randn(batch, seq, hidden, requires_grad=True)

    def run() -> torch.Tensor:
        narrow = stream @ weights["q_down"].T
        queries = functional.linear(functional.layer_norm(narrow, (LATENT.query_rank,), gains[0]), weights["q_up"])
        both = stream @ weights["kv_down"].T
        inner = functional.layer_norm(both[..., : LATENT.kv_rank], (LATENT.kv_rank,), gains[1])
        opened = functional.linear(inner, weights["kv_up"]).view(batch, seq, heads, -1).transpose(1, 2)
        turned = both[..., LATENT.kv_rank :].unsqueeze(1).expand(-1, heads, -1, -1)
        keys = torch.cat([opened[..., : LATENT.nope_dim], turned], -1)
        values = opened[..., LATENT.nope_dim :]
        queries = queries.view(batch, seq, heads, 16).transpose(1, 2) + 0.0  # turning makes it anew
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return functional.linear(mixed.transpose(1, 2).reshape(batch, seq, -1), weights["out"])

    measured = _saved_bytes(run, stream, *weights.values(), *gains)
    execution = Execution(micro_batch_size=batch, seq=seq, dtype_bytes=4)
    counted = sum(attention_part(MIXED.blocks[1], execution).saved.values())
    # On CPUs only layer norms are one kernel; each keeps a mean of every token besides.
    assert measured - 2 * tokens * 4 == counted


@pytest.mark.parametrize("active", [1, 2])
def test_experts_save_what_autograd_keeps(active: int) -> None:
    """Softmax over all experts, the best k, copies sorted by expert, a gated MLP each, and the weighted sum."""
    torch.manual_seed(0)
    experts = dataclasses.replace(PLAIN.experts, active=active)
    tokens, hidden, width = 64, PLAIN.hidden, experts.intermediate
    router = nn.Parameter(torch.randn(experts.count, hidden))
    ups = [nn.Parameter(torch.randn(experts.count, hidden, width)) for _ in range(2)]
    down = nn.Parameter(torch.randn(experts.count, width, hidden))
    stream = torch.randn(tokens, hidden, requires_grad=True)
    rows = tokens * active // experts.count  # all experts get equally many

    def run() -> torch.Tensor:
        share = torch.softmax(functional.linear(stream, router), -1)
        weight, _ = share.topk(active)
        order = torch.arange(tokens * active) // active
        copies = stream[order].view(experts.count, rows, hidden)
        gate, up = (torch.bmm(copies, each) for each in ups)
        made = torch.bmm(functional.silu(gate) * up, down).view(tokens, active, hidden)
        return (made * weight.unsqueeze(-1)).sum(1)

    measured = _saved_bytes(run, stream, router, down, *ups)
    block = dataclasses.replace(PLAIN, experts=experts).blocks[1]
    counted = feed_forward_part(block, Execution(micro_batch_size=1, seq=tokens, dtype_bytes=4)).saved
    # The order of copies is one more index for each.
    assert measured == sum(counted.values()) + tokens * active * 8


def test_costs_of_stages_differ_by_their_blocks() -> None:
    costs = estimate_costs(MIXED, ONE, micro_batch_size=1, seq=16)
    dense, sparse = costs[1], costs[2]
    # Per token 3 h f products of 2 FLOPs, against k + shared experts and the router.
    gap = 2 * 16 * 32 * (3 * (2 * 24 + 40) + 8 - 3 * 64)
    assert sparse.forward_s - dense.forward_s == pytest.approx(gap)
    stages = ppsim.partition(costs, stages=2)
    assert stages[0].parameter_bytes + stages[1].parameter_bytes == 2 * MIXED.parameters
    assert [cost.parameter_bytes for cost in costs[2:5]] == [sparse.parameter_bytes] * 3
    assert dense.parameter_bytes == 2 * MIXED.blocks[0].parameters()


def test_dealing_out_experts_leaves_the_products_and_adds_four_exchanges() -> None:
    """Each rank sends m k h elements, of which 1 / e stay: dispatch and combine, forward and backward."""
    link, execution = Link(latency_s=1.0, bytes_per_s=8.0), {"micro_batch_size": 2, "seq": 16}
    whole, dealt = (estimate_costs(MIXED, ONE, **execution, ep=ep, ep_link=link) for ep in (1, 4))
    sent = 32 * 2 * 32 * 2
    exchange_s = 1.0 + sent * 3 / 4 / 8.0
    for before, after in zip(whole[2:5], dealt[2:5], strict=True):
        assert after.forward_s == before.forward_s
        assert after.backward_weight_s == before.backward_weight_s
        assert after.forward_communication_s == pytest.approx(2 * exchange_s)
        assert after.backward_input_communication_s == pytest.approx(2 * exchange_s)
        assert before.parameter_bytes - after.parameter_bytes == 2 * (8 - 2) * MIXED.blocks[1].expert_parameters(1)
    assert dealt[1] == whole[1]  # a dense block
    again = estimate_costs(MIXED, ONE, **execution, ep=4, ep_link=link, recompute="full")[2]
    assert again.backward_input_communication_s == pytest.approx(4 * exchange_s)


def test_ranks_that_share_experts_compute_as_much_as_ranks_that_hold_them_whole() -> None:
    execution = Execution(micro_batch_size=2, seq=16, tp=2, sequence_parallel=True)
    shared, whole = (
        transformer_work(MIXED, dataclasses.replace(execution, ep=2, expert_tp=ranks))[2] for ranks in (2, 1)
    )
    assert shared.forward_flops == whole.forward_flops
    assert shared.parameter_bytes - whole.parameter_bytes == -2 * 4 * MIXED.blocks[1].expert_parameters(1) // 2
    assert (shared.forward_expert_reduces, whole.forward_expert_reduces) == (1, 0)
    # Each rank's half of the tokens in two copies; ranks that share an expert gather both halves.
    assert shared.exchanged_bytes == whole.exchanged_bytes == 16 * 2 * 32 * 2
    assert shared.expert_reduced_bytes == 2 * shared.exchanged_bytes


def test_exchanges_take_the_slower_of_the_links_within_and_across() -> None:
    machine = Machine(
        flops_per_s=1,
        bytes_per_s=1,
        memory_bytes=1,
        multiprocessors=1,
        devices_per_node=4,
        node_latency_s=1e-4,
        network_latency_s=2e-4,
        node_bytes_per_s=1e9,
        network_bytes_per_s=4e9,
    )
    assert float(machine.all_to_all_s(8e9, 1)) == 0
    assert float(machine.all_to_all_s(8e9, 4)) == pytest.approx(1e-4 + 8 * 3 / 4)
    # Of 8 ranks on two nodes, half of the bytes cross, at a quarter of the node's adapters.
    assert float(machine.all_to_all_s(8e9, 8)) == pytest.approx(2e-4 + 8 * 4 / 8)
    # Neighbours 4 apart are all on other nodes.
    assert float(machine.all_to_all_s(8e9, 4, 4)) == pytest.approx(2e-4 + 8 * 3 / 4)


def test_layer_times_have_the_exchanges() -> None:
    machine = Machine(flops_per_s=1e12, bytes_per_s=1e12, memory_bytes=1, multiprocessors=1, launch_s=1e-6)
    execution = Execution(micro_batch_size=2, seq=1024, ep=4)
    works = transformer_work(MIXED, execution)
    seconds = LayerTable([(work, execution) for work in works]).seconds(machine)
    sent = 2048 * 2 * 32 * 2
    assert seconds.exchange[2] == pytest.approx(4 * float(machine.all_to_all_s(sent, 4)))
    assert seconds.exchange[2] == seconds.communication[2]
    assert seconds.exchange[[0, 1, -1]].tolist() == [0, 0, 0]


def test_further_predictions_are_layers_before_the_head() -> None:
    plain = estimate_costs(MIXED, ONE, micro_batch_size=1, seq=16)
    further = estimate_costs(dataclasses.replace(MIXED, mtp_layers=2), ONE, micro_batch_size=1, seq=16)
    assert [cost.name for cost in further[-3:]] == ["mtp 0", "mtp 1", "head"]
    assert further[:5] == plain[:5]
    assert further[-2].forward_s - further[4].forward_s == pytest.approx(2 * 16 * 2 * 32 * 32)  # the join
    assert further[-1].forward_s == pytest.approx(3 * plain[-1].forward_s)  # three projections onto the vocabulary
    assert [cost.output_bytes for cost in further[-3:-1]] == [2 * 16 * 32 * 2, 3 * 16 * 32 * 2]
    total = sum(cost.parameter_bytes for cost in further) // 2
    table = MIXED.vocabulary * MIXED.hidden  # there again for the further predictions
    assert total == dataclasses.replace(MIXED, mtp_layers=2).parameters + table


@pytest.mark.parametrize("model", [MIXED, PLAIN], ids=["latent", "grouped"])
def test_context_parallel_ranks_share_products_and_bytes(model: Transformer) -> None:
    whole = Execution(micro_batch_size=2, seq=32, skip_masked=False)
    shared = dataclasses.replace(whole, cp=4)
    for one, part in zip(transformer_work(model, whole), transformer_work(model, shared), strict=True):
        assert 4 * part.forward_flops == one.forward_flops
        assert 4 * part.backward_flops == one.backward_flops
        assert 4 * part.output_bytes == one.output_bytes
        assert part.parameter_bytes == one.parameter_bytes
        if one.name.startswith("block"):
            assert 4 * sum(part.saved.values()) == sum(one.saved.values())


def test_keys_and_values_go_around_a_ring_under_attention() -> None:
    """Three of four shares come by, once in F and twice in B: keys, values, and their gradients."""
    link, shape = Link(latency_s=0.5, bytes_per_s=16.0), {"micro_batch_size": 2, "seq": 32, "cp": 4}
    sent = 3 * (2 * 32 // 4) * 2 * (4 * 16) * 2
    free = Device(flops_per_s=1e30, bytes_per_s=1e30)
    alone, ring = (estimate_costs(PLAIN, free, **shape, cp_link=each)[1] for each in (None, link))
    assert ring.forward_s - alone.forward_s == pytest.approx(sent / 16 + 1.5)
    assert ring.backward_input_s - alone.backward_input_s == pytest.approx(2 * sent / 16 + 1.5)
    # A slow device hides it: attention on three quarters takes longer.
    slow = Device(flops_per_s=1.0, bytes_per_s=1e30)
    assert estimate_costs(PLAIN, slow, **shape, cp_link=link) == estimate_costs(PLAIN, slow, **shape)
    # In between, what is left over is paid.
    pairs = 2 * 4 * (32 * 33 // 2) // 4
    rate = 2 * 2 * pairs * 16 / (sent / 16)  # attention takes as long as the transfer
    some = Device(flops_per_s=rate, bytes_per_s=1e30)
    alone, ring = (estimate_costs(PLAIN, some, **shape, cp_link=each)[1] for each in (None, link))
    assert ring.forward_s - alone.forward_s == pytest.approx(sent / 16 / 4 + 1.5)


def test_layer_times_have_the_ring_that_attention_does_not_hide() -> None:
    machine = Machine(
        flops_per_s=1e20, bytes_per_s=1e20, memory_bytes=1, multiprocessors=1, launch_s=1e-6, kernel_s=1e-7
    )
    execution = Execution(micro_batch_size=2, seq=32, cp=4)
    works = transformer_work(PLAIN, execution)
    seconds = LayerTable([(work, execution) for work in works]).seconds(machine)
    sent = 3 * 16 * 2 * 64 * 2
    occupied, latency = machine.message_s(sent, False)
    hidden_s = float(machine.fused_attention_s(0.0)) * 3 / 4
    expected = (float(occupied) + 3 * float(latency)) + (2 * float(occupied) + 3 * float(latency)) - 2 * hidden_s
    assert seconds.communication[1] == pytest.approx(expected, rel=1e-3)
    assert seconds.exchange[1] == seconds.communication[0] == seconds.communication[-1] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cp": 5}, "cp 5 must divide seq 32"),
        ({"cp": 2, "attention": "unfused"}, "keeps scores of whole sequences"),
        ({"cp": 16, "tp": 4, "sequence_parallel": True}, "cuts seq 2 over tp 4 ranks"),
        ({"cp": 0}, "cp must be a whole number of 1 or more"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Execution(**{"micro_batch_size": 1, "seq": 32, **changes})
