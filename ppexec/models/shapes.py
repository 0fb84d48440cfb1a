"""Shapes: what crosses the boundary between two layers, known before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor of this spec, not filled."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def infer_boundaries(layers: Sequence[nn.Module], inputs: TensorSpec) -> list[TensorSpec]:
    """The spec before each layer and after the last, shape (layers + 1,), by running the chain on the meta device.

    Nothing is computed and no parameter is touched; the layers may differ in shape and dtype. Raises ValueError that
    names the first layer that cannot take what it is given, or gives anything but one tensor.
    """
    specs = [inputs]
    value = inputs.empty("meta")
    for index, layer in enumerate(layers):
        try:
            value = _on_meta(layer, value)
        except Exception as error:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) cannot take {_text(specs[-1])}: {error}. Mend the layer "
                "before it, and hold constant tensors as buffers, so that shapes can be known without running"
            ) from error
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) gives {type(value).__name__}: a layer must give one tensor"
            )
        specs.append(TensorSpec.of(value))
    return specs


def agree_on_boundaries(
    layers: Sequence[nn.Module], read: Callable[[], torch.Tensor], *, holder: int, group: dist.ProcessGroup | None
) -> list[TensorSpec]:
    """`infer_boundaries` on all ranks of a group, where only the holder reads an input. Collective.

    Parameters
    ----------
    layers : sequence of Module
        The whole chain, which every rank has.
    read : callable
        Gives one microbatch's input. Called on the holder only.
    holder : int
        Rank in the group of the first stage.
    group : ProcessGroup or None
        None where one process has all ranks: then it infers the boundaries itself.

    Raises
    ------
    ValueError
        On every rank, for a chain that does not fit together.
    """
    if group is None:
        return infer_boundaries(layers, TensorSpec.of(read()))
    message: list[Any] = [None]
    if dist.get_rank(group) == holder:
        try:
            message = [infer_boundaries(layers, TensorSpec.of(read()))]
        except ValueError as error:
            message = [error]
    dist.broadcast_object_list(message, group=group, group_src=holder)
    if isinstance(message[0], Exception):
        raise message[0]
    agreed: list[TensorSpec] = message[0]
    return agreed


def first_overwriting(layers: Sequence[nn.Module], inputs: TensorSpec) -> list[int]:
    """Per layer the first one, itself or a later one, that works in place on what this layer is given.

    The number of layers where none does. inputs: of the first layer. The chain must have passed `infer_boundaries`.
    """
    value = inputs.empty("meta")
    given: list[tuple[int, torch.Tensor, int]] = []
    found = [len(layers)] * len(layers)
    for index, layer in enumerate(layers):
        given.append((index, value, value._version))  # a tensor and its views count their changes together
        storage = value.untyped_storage()._cdata
        value = _on_meta(layer, value)
        for before, tensor, version in given:
            if found[before] == len(layers) and tensor._version != version:
                found[before] = index
        if value.untyped_storage()._cdata != storage:
            given.clear()
    return found


def _on_meta(layer: nn.Module, value: torch.Tensor) -> torch.Tensor:
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    with torch.no_grad():
        return torch.func.functional_call(layer, tensors, (value,))


def _text(spec: TensorSpec) -> str:
    return f"a {str(spec.dtype).removeprefix('torch.')} tensor of shape {list(spec.shape)}"
