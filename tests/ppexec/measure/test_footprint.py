"""Footprint: a stage's bytes counted on the stage alone are those that it holds in any run."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppexec.measure.footprint import Footprint, measure_footprint
from ppexec.models.boundaries import first_overwriting, infer_boundaries
from ppexec.models.mlp import MLPBlock
from ppexec.models.shapes import BoundarySpec
from ppexec.stage.ledger import Ledger, gradient_bytes, tensors_of
from ppexec.stage.stage import Stage
from tests.support.chains import Chain, chains
from tests.support.factories import Frozen, Half, Remembers, Skip, Table


def stage_of(layers: list[nn.Module], like: torch.Tensor, *, index: int = 1, trains: bool = True) -> Stage:
    """A middle stage, as a worker would build it."""
    begin = first_overwriting(layers, BoundarySpec.of(like))[0]
    return Stage(
        index, layers, first_layer=0, loss=None, microbatches=1, trains=trains, copies_input=begin < len(layers)
    )


def footprint_of(stage: Stage, like: torch.Tensor, *, split: bool = False) -> Footprint:
    output = infer_boundaries(stage.layers, BoundarySpec.of(like))[-1].message

    def noise() -> torch.Tensor:
        return output.empty().normal_() if output.dtype.is_floating_point else output.empty().zero_()

    return measure_footprint(stage, like.clone, noise, None, tensors_of(stage.layers), split=split)


@pytest.mark.parametrize("split", [False, True])
def test_boundaries_inside_that_no_backward_needs_are_not_held(split: bool) -> None:
    """Layer bytes say more: each boundary as if it were kept. GELU keeps its input, ReLU its output, a sum neither."""
    inputs = torch.randn(4, 8)
    item = inputs.nbytes
    for layers, boundaries in [
        ([nn.GELU(), nn.ReLU()], 3),
        ([nn.GELU(), nn.ReLU(), nn.Flatten()], 3),
        ([nn.ReLU(), nn.GELU()], 3),
        ([nn.Linear(8, 8), Half()], 2),
        ([Skip(), nn.Linear(8, 8)], 4),
        ([nn.Linear(8, 8), nn.ReLU(inplace=True)], 2),
        ([nn.ReLU(inplace=True), nn.Linear(8, 8)], 3),
    ]:
        found = footprint_of(stage_of(layers, inputs), inputs, split=split)
        assert found.activation_bytes <= boundaries * item
    assert footprint_of(stage_of([nn.GELU(), nn.ReLU()], inputs), inputs).activation_bytes == 2 * item
    assert footprint_of(stage_of([nn.ReLU(), nn.GELU()], inputs), inputs).activation_bytes == 3 * item


def test_the_closed_form_of_an_mlp() -> None:
    inputs = torch.randn(6, 5)
    found = footprint_of(stage_of([MLPBlock(5, 7), MLPBlock(5, 7)], inputs), inputs)
    assert found.activation_bytes == 4 * 6 * (2 * (5 + 2 * 7) + 5)
    assert found.weight_activation_bytes == 4 * 6 * 2 * (2 * 5 + 2 * 7)
    assert found.parameter_bytes == found.gradient_bytes == 2 * 4 * (2 * 5 * 7 + 5 + 7)


def test_gradients_are_those_of_parameters_that_are_trained_and_reached() -> None:
    class Unused(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs

    inputs = torch.randn(2, 3)
    stage = stage_of([nn.Linear(3, 3), Frozen(3, torch.float32), Unused(3, 3)], inputs)
    found = footprint_of(stage, inputs)
    assert found.parameter_bytes == 3 * 4 * 12
    assert found.gradient_bytes == 4 * 12


def test_an_evaluation_has_parameters_alone() -> None:
    inputs = torch.randn(2, 3)
    stage = stage_of([nn.Linear(3, 3)], inputs, trains=False)
    assert footprint_of(stage, inputs).amounts() == {
        "activation_bytes": 0,
        "weight_activation_bytes": 0,
        "recompute_bytes": 0,
        "parameter_bytes": 48,
        "gradient_bytes": 0,
    }


def test_layers_are_left_as_they_were() -> None:
    """Cause of a slower forward: hooks of a split backward stayed on the layers of a run that has none."""
    block, inputs = MLPBlock(3, 5), torch.randn(2, 3)
    footprint_of(stage_of([block], inputs), inputs)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in block.modules())
    assert all(parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("split", [False, True])
@given(chain=chains(odd=True), order=st.permutations([0, 1, 2, 0, 1, 2, 0, 1, 2]))
def test_a_stage_alone_holds_what_it_holds_among_others(split: bool, chain: Chain, order: list[int]) -> None:
    """Three microbatches under way in any order: F, then B or I, then W; levels are sums of the footprint's."""
    model = chain.build()
    samples = [model.sample(index)[0] for index in range(3)]
    stage = stage_of(list(model.layers), samples[0], index=0)
    found = footprint_of(stage, samples[0], split=split)
    stage.ledger = ledger = Ledger([*tensors_of(stage.layers), *found.older])
    done, held, weights = [0, 0, 0], 0, 0
    for b in order:
        if done[b] == 0:
            output = stage.forward(b, samples[b], None, split=split)
            held += found.activation_bytes
        elif done[b] == 1:
            gradient = torch.randn(output.shape).to(output.dtype)
            held -= found.activation_bytes
            if split:
                stage.backward_input(b, gradient)
                held += found.weight_activation_bytes
            else:
                stage.backward(b, gradient)
                weights = found.gradient_bytes
        elif split:
            stage.backward_weight(b)
            held -= found.weight_activation_bytes
            weights = found.gradient_bytes
        done[b] += 1
        assert ledger.level_bytes == held
        assert gradient_bytes(stage.layers) == weights
    assert held == 0


def test_a_table_made_in_the_first_forward_is_older_than_the_step() -> None:
    """Cause of bytes that were never released: every microbatch shares it, and no attribute shows it."""
    layers, inputs = [nn.Linear(3, 3), Table()], torch.randn(2, 3)
    found = footprint_of(stage_of(layers, inputs), inputs)
    assert [storage.nbytes() for storage in found.older] == [12]
    assert found.activation_bytes == 2 * inputs.nbytes


def test_what_is_older_stays_so_after_it_is_gone() -> None:
    """Cause of bytes that were not counted: a new tensor got the address of an attribute that had been replaced."""
    layer = Remembers()
    layer(torch.randn(64, 64))
    ledger = Ledger(tensors_of([layer]))
    layer.last = None
    gc.collect()
    storages = [torch.empty(64, 64) for _ in range(32)]
    for storage in storages:
        ledger.hold(storage)
        saved = ledger._pack(storage)
        assert saved is not storage
