"""Shapes: what crosses the boundary between two layers, known before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ppsim.errors import InputError

Tree = Any
"""A tensor, or a tuple, list, dict or dataclass of tensors, nested as one likes; None may stand for a tensor."""

_ALIGNMENT_BYTES = 16  # of a tensor in a packed message: the largest item, a complex128


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)

    def __str__(self) -> str:
        return f"a {str(self.dtype).removeprefix('torch.')} tensor of shape {list(self.shape)}"

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor of this spec, not filled."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def tensors_in(value: Tree) -> list[torch.Tensor]:
    """The tensors of a pytree, in its order."""
    if isinstance(value, torch.Tensor):  # mostly, and walking a tree takes longer than a launch
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def differentiable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those that can have a gradient: of floating point or complex numbers."""
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]


def _has_gradient(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def pack(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One message of several tensors: a buffer of bytes. A tensor alone is its own message."""
    if len(tensors) == 1:
        return tensors[0]
    specs = [TensorSpec.of(tensor) for tensor in tensors]
    message = packed_spec(specs).empty(device)
    for part, tensor in zip(unpack(message, specs), tensors, strict=True):
        part.copy_(tensor)
    return message


def unpack(message: torch.Tensor, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """The tensors of a message, which share its memory."""
    if len(specs) == 1:
        return [message]
    return [
        message[start : start + spec.size_bytes].view(spec.dtype).view(spec.shape)
        for start, spec in zip(_starts(specs), specs, strict=False)
    ]


def packed_spec(specs: Sequence[TensorSpec]) -> TensorSpec:
    """The spec of the message that `pack` makes of tensors with these specs."""
    return specs[0] if len(specs) == 1 else TensorSpec(shape=(_starts(specs)[-1],), dtype=torch.uint8)


def _starts(specs: Sequence[TensorSpec]) -> list[int]:
    """Where each tensor begins in its message, and where the last one's place ends."""
    places = [-(-spec.size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for spec in specs]
    return [0, *accumulate(places)]


@dataclass(frozen=True, kw_only=True)
class BoundarySpec:
    """What crosses the boundary between two layers, and the messages that carry it and its gradient.

    Parameters
    ----------
    tree : TreeSpec
        How the tensors are nested.
    leaves : tuple of TensorSpec or None
        The tensors in the tree's order; None where the tree has None.

    Notes
    -----
    A message is one tensor. A tensor alone is sent as it is. Several are packed into one buffer of bytes, each at a
    multiple of 16. The message that goes back has the gradients of the floating tensors only, and no bytes where there
    are none.
    """

    tree: pytree.TreeSpec = field(hash=False)
    leaves: tuple[TensorSpec | None, ...]

    @cached_property
    def name(self) -> str:
        """The same text in every process for the same spec, and for no other."""
        return f"{self.tree}: {', '.join(map(str, self.leaves))}"

    @classmethod
    def of(cls, value: Tree) -> BoundarySpec:
        """The spec of a value. Makes dataclasses in it known to PyTorch's pytrees.

        Raises
        ------
        InputError
            If it has something else than tensors, or none.
        """
        leaves, tree = _flattened(value)
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, torch.Tensor):
                inside = "" if leaf is value else f" with a {type(leaf).__name__} inside"
                raise InputError(
                    f"{type(value).__name__}{inside}: give a tensor, or a tuple, list, dict or dataclass of tensors"
                )
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise InputError(f"{type(value).__name__} without a tensor: give at least one")
        return cls(tree=tree, leaves=tuple(None if leaf is None else TensorSpec.of(leaf) for leaf in leaves))

    def __str__(self) -> str:
        if self.tree.is_leaf():
            return str(self.leaves[0])
        return f"{self.tree.type.__name__} of {', '.join(map(str, self.tensors))}"

    @cached_property
    def tensors(self) -> list[TensorSpec]:
        """The specs of the tensors."""
        return [leaf for leaf in self.leaves if leaf is not None]

    @cached_property
    def message(self) -> TensorSpec:
        """The spec of the message to the next stage."""
        return packed_spec(self.tensors)

    @cached_property
    def gradient(self) -> TensorSpec:
        """The spec of the message that comes back."""
        return packed_spec([spec for spec in self.tensors if _has_gradient(spec.dtype)])

    @property
    def rows(self) -> int:
        """The first dimension of the first tensor, which counts samples; 1 for a tensor without dimensions."""
        return (*self.tensors[0].shape, 1)[0]

    def empty(self, device: torch.device | str = "cpu") -> Tree:
        """A value of this spec, not filled."""
        return self._joined([spec.empty(device) for spec in self.tensors])

    def unpack(self, message: torch.Tensor) -> Tree:
        """The value that a message carries; its tensors share the message's memory."""
        return message if self.tree.is_leaf() else self._joined([t.detach() for t in unpack(message, self.tensors)])

    def _joined(self, tensors: Sequence[torch.Tensor]) -> Tree:
        rest = iter(tensors)
        return pytree.tree_unflatten([None if leaf is None else next(rest) for leaf in self.leaves], self.tree)


def _flattened(value: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and tree. Dataclasses that pytrees do not know are made known, from the outermost to the innermost."""
    while True:
        leaves, tree = pytree.tree_flatten(value)
        unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
        if not unknown:
            return leaves, tree
        for each in unknown:
            pytree.register_dataclass(each)
