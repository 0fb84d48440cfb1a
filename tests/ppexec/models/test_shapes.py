"""Shapes: what crosses a boundary is known before anything runs, for any chain of layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from torch import nn

from ppexec.models.boundaries import Boundaries, first_overwriting, infer_boundaries
from ppexec.models.shapes import BoundarySpec, TensorSpec, differentiable, pack, tensors_in
from tests.support.chains import Chain, chains


@given(chains())
def test_boundaries_are_the_shapes_and_dtypes_that_a_real_run_has(chain: Chain) -> None:
    model = chain.build()
    value, _ = model.sample(0)
    inferred = infer_boundaries(model.layers, BoundarySpec.of(value))
    real = [BoundarySpec.of(value)]
    for layer in model.layers:
        value = layer(value)
        real.append(BoundarySpec.of(value))
    assert inferred == real


def test_a_layer_on_the_meta_device_has_boundaries_too() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)]
    specs = infer_boundaries(layers, BoundarySpec.of(torch.zeros(4, 3)))
    assert [spec.message.shape for spec in specs] == [(4, 3), (4, 5), (4, 5), (4, 2)]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_inference_changes_nothing() -> None:
    layers = [nn.BatchNorm1d(3), nn.Linear(3, 3)]
    before = [tensor.clone() for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]]
    state = torch.get_rng_state()
    infer_boundaries(layers, BoundarySpec.of(torch.zeros(4, 3)))
    after = [tensor for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for layer in layers for parameter in layer.parameters())


def test_the_first_layer_that_does_not_fit_is_named_with_what_it_was_given() -> None:
    layers = [nn.Linear(3, 5), nn.GELU(), nn.Linear(4, 2), nn.Linear(9, 9)]
    message = r"layer 2 \(Linear\) cannot take a float32 tensor of shape \[7, 5\]"
    with pytest.raises(ValueError, match=message):
        infer_boundaries(layers, BoundarySpec.of(torch.zeros(7, 3)))


def test_a_dtype_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(Embedding\) cannot take a float32 tensor"):
        infer_boundaries(
            [nn.Embedding(4, 4)],
            BoundarySpec.of(
                torch.zeros(
                    2,
                )
            ),
        )


class Gives(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: torch.Tensor) -> object:
        return self.value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "str: give a tensor, or a tuple, list, dict or dataclass of tensors"),
        ((torch.zeros(1), 3.5), "tuple with a float inside: give a tensor"),
        ({}, "dict without a tensor: give at least one"),
        (None, "NoneType without a tensor"),
    ],
    ids=str,
)
def test_a_layer_that_gives_something_else_than_tensors_is_named(value: object, text: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 1 \(Gives\) gives {text}"):
        infer_boundaries([nn.Identity(), Gives(value), nn.Identity()], BoundarySpec.of(torch.zeros(2)))


@dataclass
class Inner:
    mask: torch.Tensor
    more: torch.Tensor | None = None


@dataclass(frozen=True)
class Outer:
    hidden: torch.Tensor
    inner: Inner


HIDDEN, MASK, POSITIONS = torch.randn(3, 5), torch.tensor([True, False, True]), torch.arange(3)


@pytest.mark.parametrize(
    "value",
    [
        HIDDEN,
        (HIDDEN,),
        (HIDDEN, MASK, POSITIONS),
        [MASK, {"a": HIDDEN, "b": (POSITIONS, None)}],
        Outer(HIDDEN, Inner(MASK)),
        (torch.zeros(0, 7), torch.tensor(3.0, dtype=torch.complex128), HIDDEN.half().T),
    ],
    ids=["tensor", "alone", "tuple", "nested", "dataclass", "odd"],
)
def test_a_message_brings_back_what_was_packed(value: object) -> None:
    spec = BoundarySpec.of(value)
    tensors = tensors_in(value)
    message = pack(tensors, HIDDEN.device)
    assert TensorSpec.of(message) == spec.message
    assert message.nbytes == spec.message.size_bytes == message.untyped_storage().nbytes()
    back = spec.unpack(message)
    assert type(back) is type(value)
    assert BoundarySpec.of(back) == spec
    assert all(torch.equal(one, other) for one, other in zip(tensors_in(back), tensors, strict=True))
    assert TensorSpec.of(pack(differentiable(tensors), HIDDEN.device)) == spec.gradient


def test_messages_have_places_of_16_bytes_and_gradients_of_floating_tensors_alone() -> None:
    spec = BoundarySpec.of((HIDDEN, MASK, POSITIONS))
    assert spec.message.size_bytes == 64 + 16 + 32  # of 60, 3 and 24 bytes
    assert spec.gradient == TensorSpec(shape=(3, 5), dtype=torch.float32)
    assert BoundarySpec.of([MASK, POSITIONS]).gradient.size_bytes == 0
    assert BoundarySpec.of(POSITIONS).gradient.size_bytes == 0


class HiddenConstant(nn.Module):
    """Keeps a tensor where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.ones(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.constant


def test_a_constant_that_is_no_buffer_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(HiddenConstant\).*constant tensors as buffers"):
        infer_boundaries([HiddenConstant()], BoundarySpec.of(torch.zeros(2, 3)))


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
    spec = BoundarySpec.of(torch.zeros(4))
    assert first_overwriting([in_place], spec) == [0]
    assert first_overwriting([linear, copy], spec) == [2, 2]
    assert first_overwriting([linear, in_place, linear], spec) == [3, 1, 3]
    assert first_overwriting([view, nn.Identity(), in_place, copy, in_place], spec) == [2, 2, 2, 5, 4]


def test_a_process_that_has_all_ranks_agrees_with_nobody() -> None:
    boundaries = Boundaries([nn.Linear(3, 4), nn.Linear(4, 5)])
    found = boundaries.agree(lambda: [torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 3)], 3)
    assert [[spec.message.shape for spec in each] for each in found] == [
        [(2, 3), (2, 4), (2, 5)],
        [(1, 3), (1, 4), (1, 5)],
        [(2, 3), (2, 4), (2, 5)],
    ]
    assert found[0] is found[2]
