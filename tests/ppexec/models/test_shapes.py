"""Shapes: what crosses a boundary is known before anything runs, for any chain of layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import nn

from ppexec.models.shapes import TensorSpec, agree_on_boundaries, first_overwriting, infer_boundaries
from tests.support.chains import Chain, chains


@given(chains())
def test_boundaries_are_the_shapes_and_dtypes_that_a_real_run_has(chain: Chain) -> None:
    model = chain.build()
    value, _ = model.sample(0)
    inferred = infer_boundaries(model.layers, TensorSpec.of(value))
    real = [TensorSpec.of(value)]
    for layer in model.layers:
        value = layer(value)
        real.append(TensorSpec.of(value))
    assert inferred == real


def test_a_layer_on_the_meta_device_has_boundaries_too() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)]
    specs = infer_boundaries(layers, TensorSpec(shape=(4, 3), dtype=torch.float32))
    assert [spec.shape for spec in specs] == [(4, 3), (4, 5), (4, 5), (4, 2)]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_inference_changes_nothing() -> None:
    layers = [nn.BatchNorm1d(3), nn.Linear(3, 3)]
    before = [tensor.clone() for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]]
    state = torch.get_rng_state()
    infer_boundaries(layers, TensorSpec(shape=(4, 3), dtype=torch.float32))
    after = [tensor for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for layer in layers for parameter in layer.parameters())


def test_the_first_layer_that_does_not_fit_is_named_with_what_it_was_given() -> None:
    layers = [nn.Linear(3, 5), nn.GELU(), nn.Linear(4, 2), nn.Linear(9, 9)]
    message = r"layer 2 \(Linear\) cannot take a float32 tensor of shape \[7, 5\]"
    with pytest.raises(ValueError, match=message):
        infer_boundaries(layers, TensorSpec(shape=(7, 3), dtype=torch.float32))


def test_a_dtype_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(Embedding\) cannot take a float32 tensor"):
        infer_boundaries([nn.Embedding(4, 4)], TensorSpec(shape=(2,), dtype=torch.float32))


class Pair(nn.Module):
    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs, inputs


def test_a_layer_that_gives_more_than_one_tensor_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 1 \(Pair\) gives tuple: a layer must give one tensor"):
        infer_boundaries([nn.Identity(), Pair(), nn.Identity()], TensorSpec(shape=(2,), dtype=torch.float32))


class HiddenConstant(nn.Module):
    """Keeps a tensor where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.ones(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.constant


def test_a_constant_that_is_no_buffer_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(HiddenConstant\).*constant tensors as buffers"):
        infer_boundaries([HiddenConstant()], TensorSpec(shape=(2, 3), dtype=torch.float32))


@pytest.mark.parametrize(
    ("shape", "dtype", "size_bytes"),
    [((2, 3), torch.float32, 24), ((5,), torch.float64, 40), ((), torch.int64, 8), ((0, 7), torch.float32, 0)],
)
def test_a_spec_knows_its_bytes(shape: tuple[int, ...], dtype: torch.dtype, size_bytes: int) -> None:
    spec = TensorSpec(shape=shape, dtype=dtype)
    assert spec.size_bytes == size_bytes == spec.empty().nbytes
    assert TensorSpec.of(spec.empty()) == spec


def test_what_works_in_place_on_what_is_found_through_views() -> None:
    """A tensor and its views are one; what a layer makes anew is another's."""
    in_place, linear, view, copy = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Flatten(0), nn.Tanh()
    spec = TensorSpec(shape=(4,), dtype=torch.float32)
    assert first_overwriting([in_place], spec) == [0]
    assert first_overwriting([linear, copy], spec) == [2, 2]
    assert first_overwriting([linear, in_place, linear], spec) == [3, 1, 3]
    assert first_overwriting([view, nn.Identity(), in_place, copy, in_place], spec) == [2, 2, 2, 5, 4]


def test_a_process_that_has_all_ranks_agrees_with_nobody() -> None:
    def read() -> torch.Tensor:
        return torch.zeros(2, 3)

    layers = [nn.Linear(3, 4), nn.Linear(4, 5)]
    assert [spec.shape for spec in agree_on_boundaries(layers, read, holder=1, group=None)] == [(2, 3), (2, 4), (2, 5)]
