"""Boundaries: what crosses the boundaries of a chain of layers, found by running it without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ppexec.models.shapes import BoundarySpec, Tree, tensors_in
from ppsim.errors import InputError


def infer_boundaries(layers: Sequence[nn.Module], inputs: BoundarySpec) -> list[BoundarySpec]:
    """The specs of what crosses the boundaries between layers, by running the chain on the meta device.

    Nothing is computed and no parameter is touched. The layers may differ in shape and dtype.

    Parameters
    ----------
    layers : sequence of Module
        The chain.
    inputs : BoundarySpec
        The spec of one microbatch's input.

    Returns
    -------
    list of BoundarySpec, shape (layers + 1,)
        The spec of what enters each layer, and of what leaves the last.

    Raises
    ------
    InputError
        For the first layer that cannot take what it is given, or returns something other than tensors.

    Examples
    --------
    >>> chain = [nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2)]
    >>> specs = infer_boundaries(chain, BoundarySpec.of(torch.zeros(3, 4)))
    >>> [spec.message.shape for spec in specs]
    [(3, 4), (3, 16), (3, 16), (3, 2)]
    """
    return _walk(layers, inputs)[0]


def _walk(layers: Sequence[nn.Module], inputs: BoundarySpec) -> tuple[list[BoundarySpec], list[int]]:
    """What `infer_boundaries` and `first_overwriting` give, from one run on the meta device."""
    specs = [inputs]
    value = inputs.empty("meta")
    watched: list[tuple[int, torch.Tensor, int]] = []  # layer, a tensor of its input, and that tensor's version
    overwriting = [len(layers)] * len(layers)
    for index, layer in enumerate(layers):
        # An operation in place raises the version of a tensor and of all its views.
        watched += [(index, tensor, tensor._version) for tensor in tensors_in(value)]
        try:
            value = _on_meta(layer, value)
        except Exception as error:
            raise InputError(
                f"layer {index} ({type(layer).__name__}) cannot take {specs[-1]}: {error}. Make this layer "
                "and the one before it fit, and hold constant tensors as buffers, so that shapes can be known without "
                "running"
            ) from error
        try:
            specs.append(BoundarySpec.of(value))
        except InputError as error:
            raise InputError(f"layer {index} ({type(layer).__name__}) gives {error}") from None
        for owner, tensor, version in watched:
            if overwriting[owner] == len(layers) and tensor._version != version:
                overwriting[owner] = index
        storages = {tensor.untyped_storage()._cdata for tensor in tensors_in(value)}
        # No later layer can write to a tensor that shares no storage with the value.
        watched = [each for each in watched if each[1].untyped_storage()._cdata in storages]
    return specs, overwriting


class Boundaries:
    """The boundaries of a chain, for each kind of input that it has been given. Inputs of one kind have equal specs.

    Parameters
    ----------
    layers : sequence of Module
        The whole chain, which every rank has.
    holder : int
        The group's rank that has the first stage. Only this rank reads inputs.
    group : ProcessGroup or None
        The ranks of the pipeline; None where one process has them all.
    device : torch.device
        The device on which the group's collectives need their tensors.

    Attributes
    ----------
    overwriting : list of int, shape (layers,)
        What `first_overwriting` gives for the first kind of input. It is taken to hold for other kinds.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        holder: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._layers, self._holder, self._group, self._device = layers, holder, group, device
        self._numbers: dict[BoundarySpec, int] = {}
        self._known: list[list[BoundarySpec]] = []
        self.overwriting: list[int] = []

    def agree(self, read: Callable[[], Sequence[Tree]], count: int) -> list[list[BoundarySpec]]:
        """Let all ranks know the boundaries of some microbatches. Collective.

        Parameters
        ----------
        read : callable
            Returns the inputs of the microbatches. Only the holder calls it.
        count : int
            Number of microbatches.

        Returns
        -------
        list of list of BoundarySpec
            For each microbatch what `infer_boundaries` gives.

        Raises
        ------
        InputError
            On every rank, for inputs that are no tensors, or a chain that does not fit together. What else `read`
            raises is raised on the holder alone, while the others wait until it ends.
        """
        # Kinds are numbered in the sequence in which they come. Ranks first learn the number of each microbatch's kind.
        # If one is new, not below `len(self._known)`, a second broadcast follows: of inputs of the new kinds, or of an
        # error.
        if self._group is None:
            return self._found(*self._numbered(read()))
        numbers = torch.zeros(count, dtype=torch.int64)
        news: list[Any] = [None]
        is_holder = dist.get_rank(self._group) == self._holder
        if is_holder:
            try:
                found, new = self._numbered(read())
                numbers, news = torch.tensor(found, dtype=torch.int64), [new]
            except InputError as error:
                numbers, news = torch.full_like(numbers, len(self._known)), [error]
        numbers = numbers.to(self._device)
        dist.broadcast(numbers, group=self._group, group_src=self._holder)
        found = numbers.tolist()
        if max(found) >= len(self._known):
            dist.broadcast_object_list(news, group=self._group, group_src=self._holder)
            if isinstance(news[0], Exception):
                raise news[0]
            return self._found(found, news[0])
        return self._found(found, [])

    def _numbered(self, inputs: Sequence[Tree]) -> tuple[list[int], list[Tree]]:
        """The number of each input's kind, and an input on the meta device of each new kind.

        Empty inputs are sent to other ranks and not specs, so that `BoundarySpec.of` makes the dataclasses in them
        known to PyTorch there too.
        """
        specs = [BoundarySpec.of(value) for value in inputs]
        new = [spec for spec in dict.fromkeys(specs) if spec not in self._numbers]
        numbers = {**self._numbers, **{spec: len(self._known) + at for at, spec in enumerate(new)}}
        return [numbers[spec] for spec in specs], [spec.empty("meta") for spec in new]

    def _found(self, numbers: Sequence[int], new: Sequence[Tree]) -> list[list[BoundarySpec]]:
        for value in new:
            spec = BoundarySpec.of(value)
            boundaries, overwriting = _walk(self._layers, spec)
            self.overwriting = self.overwriting or overwriting
            self._known.append(boundaries)
            self._numbers[spec] = len(self._numbers)
        return [self._known[number] for number in numbers]


def first_overwriting(layers: Sequence[nn.Module], inputs: BoundarySpec) -> list[int]:
    """For each layer, the index of the first layer, from this one on, that writes in place on this layer's input.

    Parameters
    ----------
    layers : sequence of Module
        A chain that `infer_boundaries` has accepted.
    inputs : BoundarySpec
        The spec of the first layer's input.

    Returns
    -------
    list of int, shape (layers,)
        The index for each layer; `len(layers)` if none writes on its input.
    """
    return _walk(layers, inputs)[1]


def _on_meta(layer: nn.Module, value: Tree) -> Tree:
    """Run a layer on the meta device, with meta copies of its parameters and buffers."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    with torch.no_grad():
        return torch.func.functional_call(layer, tensors, (value,))
