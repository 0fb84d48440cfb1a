"""The split backward: same bits as the whole one, and memory released at I."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.split_backward import SplitBackward, add_weight_gradients, owners
from ppexec.stage.stage import Stage
from tests.support.layers import LAYERS, WIDTH, Residual, SelfAttention


def stage_of(layers: list[nn.Module], *, index: int, microbatches: int) -> Stage:
    return Stage(index, layers, first_layer=0, loss=None, microbatches=microbatches, trains=True)


@settings(max_examples=25)
@given(
    kinds=st.lists(st.integers(0, len(LAYERS) - 1), min_size=1, max_size=4),
    is_first=st.booleans(),
    order=st.permutations(range(3)),
    seed=st.integers(0, 2**31),
)
def test_split_and_whole_backward_have_the_same_bits(
    kinds: list[int], is_first: bool, order: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [LAYERS[kind]() for kind in kinds]
    split, whole = stage_of(layers, index=0 if is_first else 1, microbatches=3), None
    whole = stage_of(copy.deepcopy(layers), index=0 if is_first else 1, microbatches=3)
    inputs = [torch.randn(2, 5, WIDTH) for _ in range(3)]
    gradients = [torch.randn(2, 5, WIDTH) for _ in range(3)]
    for b in range(3):
        assert torch.equal(
            split.forward(b, inputs[b].clone(), None, split=True), whole.forward(b, inputs[b].clone(), None)
        )
    for b in range(3):
        first, second = split.backward_input(b, gradients[b]), whole.backward(order[b], gradients[order[b]])
        assert (first is None) == is_first
        if b == order[b] and first is not None:
            assert torch.equal(first, second)
    for b in order:
        split.backward_weight(b)
    for mine, theirs in zip(split.layers, whole.layers, strict=True):
        for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad), name


def test_between_i_and_w_only_inputs_and_output_gradients_of_linear_layers_are_held() -> None:
    width, rows, size = 16, 6, 4
    layers = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(2)]
    stage = stage_of(layers, index=1, microbatches=1)
    stage.ledger = ledger = Ledger(tensors_of(layers))
    unit = rows * width * size
    stage.forward(0, torch.randn(rows, width), None, split=True)
    # per layer: the input, fc1's output (for GELU) and GELU's (for fc2); and the last output
    assert ledger.level_bytes == (2 * 9 + 1) * unit
    stage.backward_input(0, torch.randn(rows, width))
    # per layer: inputs of fc1 and fc2, and the gradients of their outputs
    assert ledger.level_bytes == 2 * (1 + 4 + 4 + 1) * unit
    assert all(parameter.grad is None for layer in layers for parameter in layer.parameters())
    stage.backward_weight(0)
    assert ledger.level_bytes == 0
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())


def test_post_accumulate_hooks_fire_at_w() -> None:
    """autograd.grad would not run them, and data parallelism hangs on them."""
    layer = nn.Linear(3, 3)
    seen: list[str] = []
    layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("weight"))
    stage = stage_of([layer], index=1, microbatches=1)
    stage.forward(0, torch.randn(2, 3), None, split=True)
    stage.backward_input(0, torch.randn(2, 3))
    assert seen == []
    stage.backward_weight(0)
    assert seen == ["weight"]


def test_a_frozen_parameter_gets_no_gradient() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers[0].weight.requires_grad_(False)
    stage = stage_of([layers], index=1, microbatches=1)
    stage.forward(0, torch.randn(2, 3), None, split=True)
    stage.backward_input(0, torch.randn(2, 3))
    stage.backward_weight(0)
    assert layers[0].weight.grad is None
    assert layers[0].bias.grad is not None


def test_the_units_are_the_outermost_modules_that_own_parameters() -> None:
    attention, residual = SelfAttention(WIDTH), Residual(WIDTH)
    assert owners(attention) == [attention.attention]
    assert owners(residual) == [residual.norm, residual.mlp[0], residual.mlp[2]]
    assert owners(nn.Sequential(nn.ReLU())) == []


def test_nothing_is_recorded_outside_of_recording() -> None:
    layer = nn.Linear(3, 3)
    split = SplitBackward([layer])
    layer(torch.randn(2, 3)).sum().backward()
    assert layer.weight.grad is not None
    with split.recording(None) as units:
        layer(torch.randn(2, 3))
    assert len(units) == 1
    with pytest.raises(RuntimeError), split.recording(None) as units:
        layer(torch.randn(2, 4))
    add_weight_gradients(units)  # nothing reached it
    layer(torch.randn(2, 3)).sum().backward()
