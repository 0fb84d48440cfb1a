"""Stage: a run of layers whose backward, whole or in two halves, is autograd's, bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppexec import Model
from ppexec.models.mlp import MLPBlock
from ppexec.stage.build import build_stage
from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.stage import Stage
from tests.support.chains import Chain, chains

CPU = torch.device("cpu")


def stage_of(
    layers: Sequence[nn.Module], *, index: int = 1, loss: object = None, microbatches: int = 1, trains: bool = True
) -> Stage:
    return Stage(index, layers, first_layer=0, loss=loss, microbatches=microbatches, trains=trains)  # type: ignore[arg-type]


def copies_of(chain: Chain) -> tuple[Model, Model]:
    """Twice the same model with the same weights."""
    one, other = chain.build(), chain.build()
    for first, second in zip(one.layers, other.layers, strict=True):
        second.load_state_dict(first.state_dict())
    return one, other


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("split", [False, True])
@given(chain=chains(), order=st.permutations([0, 1, 2]), late=st.permutations([0, 1, 2]))
def test_backwards_in_any_order_are_those_of_autograd(
    split: bool, chain: Chain, order: list[int], late: list[int]
) -> None:
    """Three forwards, their backwards in one order, and, if split, the weights' in another."""
    model, plain = copies_of(chain)
    stage = stage_of(model.layers, index=0, loss=model.loss, microbatches=3)
    samples = [model.sample(index) for index in range(3)]
    outputs = [stage.forward(b, *samples[b], split=split) for b in range(3)]
    for b in order:
        assert (stage.backward_input(b, None) if split else stage.backward(b, None)) is None
    for b in late if split else []:
        stage.backward_weight(b)
    network = nn.Sequential(*plain.layers)
    for output, (inputs, _) in zip(outputs, samples, strict=True):
        assert torch.equal(network(inputs), output)
    for b in late if split else order:
        (plain.loss(network(samples[b][0]), samples[b][1]) / 3).backward()
    for one, other in zip(nn.Sequential(*model.layers).parameters(), network.parameters(), strict=True):
        assert same(one.grad, other.grad)


@pytest.mark.parametrize("split", [False, True])
def test_a_middle_stage_gives_the_gradient_of_its_input(split: bool) -> None:
    block, inputs, gradient = MLPBlock(3, 5), torch.randn(2, 3), torch.randn(2, 3)
    stage = stage_of([block])
    stage.forward(0, inputs.clone(), None, split=split)
    given = stage.backward_input(0, gradient) if split else stage.backward(0, gradient)
    leaf = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(block(leaf), leaf, gradient)
    assert given is not None
    assert torch.equal(given, expected)


def test_between_the_halves_the_weights_have_no_gradient_yet() -> None:
    block = MLPBlock(3, 5)
    stage = stage_of([block])
    stage.forward(0, torch.randn(2, 3), None, split=True)
    stage.backward_input(0, torch.ones(2, 3))
    assert all(parameter.grad is None for parameter in block.parameters())
    stage.backward_weight(0)
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize(("hidden", "intermediate", "rows"), [(4, 16, 3), (8, 8, 1), (5, 2, 7)])
def test_between_the_halves_a_block_holds_inputs_and_output_gradients_of_its_weights(
    hidden: int, intermediate: int, rows: int
) -> None:
    """Of fc1 its input and its output's gradient, of fc2 the same: the zero-bubble papers' memory."""
    layers = [MLPBlock(hidden, intermediate)]
    stage = stage_of(layers)
    stage.ledger = Ledger(tensors_of(layers))
    stage.forward(0, torch.randn(rows, hidden), None, split=True)
    assert stage.ledger.level_bytes == 4 * rows * (2 * hidden + 2 * intermediate)
    stage.backward_input(0, torch.randn(rows, hidden))
    assert stage.ledger.level_bytes == 4 * rows * ((hidden + intermediate) + (intermediate + hidden))
    stage.backward_weight(0)
    assert stage.ledger.level_bytes == 0


def test_an_input_that_can_have_no_gradient_sends_no_bytes() -> None:
    stage = stage_of([nn.Embedding(5, 3)])
    stage.forward(0, torch.tensor([1, 2]), None)
    given = stage.backward(0, torch.ones(2, 3))
    assert given is not None
    assert given.nbytes == 0


def test_an_output_that_ignores_its_input_sends_zeros() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.value * 1

    layer = Constant()
    stage = stage_of([layer])
    stage.forward(0, torch.randn(3), None)
    given = stage.backward(0, torch.ones(2))
    assert given is not None
    assert torch.equal(given, torch.zeros(3))
    assert layer.value.grad is not None


def test_a_stage_without_its_input_says_so() -> None:
    with pytest.raises(RuntimeError, match="stage 1 has no input for microbatch 4"):
        stage_of([nn.Identity()]).forward(4, None, None)


def test_an_evaluation_keeps_no_graph() -> None:
    block = MLPBlock(3, 5)
    stage = stage_of([block], index=0, trains=False, loss=nn.functional.mse_loss)
    output = stage.forward(0, torch.randn(2, 3), torch.zeros(2, 3))
    assert not output.requires_grad
    assert torch.equal(stage.losses[0], output.square().mean())


@pytest.mark.parametrize("trains", [True, False])
def test_a_loss_holds_no_memory_but_its_number(trains: bool) -> None:
    """PyTorch's mean squared error lies in memory as large as the output, which would be held for all of the step."""
    stage = stage_of([nn.Linear(8, 8)], index=0, loss=nn.functional.mse_loss, trains=trains)
    stage.forward(0, torch.ones(4, 8), torch.zeros(4, 8))
    assert stage.losses[0].untyped_storage().nbytes() == stage.losses[0].nbytes
    if trains:
        assert stage._held[0].loss.untyped_storage().nbytes() == stage.losses[0].nbytes
        stage.backward(0, None)
        assert stage.layers[0].weight.grad is not None


def test_clearing_forgets_gradients_losses_and_what_was_under_way() -> None:
    block = MLPBlock(3, 5)
    stage = stage_of([block], index=0, loss=nn.functional.mse_loss, microbatches=2)
    for microbatch, split in itertools.product(range(2), (False, True)):
        stage.forward(microbatch, torch.randn(2, 3), torch.zeros(2, 3), split=split)
    stage.backward_input(0, None)
    stage.backward_weight(0)
    stage.clear()
    assert all(parameter.grad is None for parameter in block.parameters())
    assert stage.losses == {}
    with pytest.raises(KeyError):
        stage.backward(1, None)


def test_a_stage_makes_its_own_layers_real_and_leaves_the_others() -> None:
    with torch.device("meta"):
        layers = [MLPBlock(3, 5) for _ in range(4)]
    model = Model(layers=layers, sample=lambda index: (torch.zeros(1), torch.zeros(1)), loss=nn.functional.mse_loss)
    common = {"microbatches": 2, "trains": True, "seed": 0, "device": CPU}
    stage = build_stage(1, model, range(1, 3), is_last=False, **common)
    assert [parameter.is_meta for layer in layers for parameter in layer.parameters()] == (
        [True] * 4 + [False] * 8 + [True] * 4
    )
    assert (stage.first_layer, stage.loss, stage.is_first) == (1, None, False)
    assert build_stage(0, model, range(1), is_last=True, **common).loss is nn.functional.mse_loss


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_may_work_in_place_on_the_stages_input(index: int, split: bool) -> None:
    """Cause of a failure: autograd forbids it on a leaf, and the tensor is the stage before's, or the data's."""
    inputs, gradient = torch.randn(2, 3), torch.randn(2, 3)
    layers = [nn.ReLU(inplace=True), nn.Linear(3, 3)]
    stage = Stage(index, layers, first_layer=0, loss=None, microbatches=1, trains=True, copies_input=True)
    given = inputs.clone()
    output = stage.forward(0, given, None, split=split)
    assert torch.equal(given, inputs)
    found = stage.backward_input(0, gradient) if split else stage.backward(0, gradient)
    leaf = inputs.clone().requires_grad_()
    expected = layers[1](leaf.relu())
    assert torch.equal(output, expected)
    if index:
        assert found is not None
        assert torch.equal(found, torch.autograd.grad(expected, leaf, gradient)[0])
