"""Recomputing stage: it keeps only its layers' inputs and computes each layer again for its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ppexec.models.batch import fitted
from ppexec.models.model_error import reraise
from ppexec.models.shapes import Tree, differentiable, pack, tensors_in
from ppexec.stage.message import gradients_of, message_of, versions
from ppexec.stage.split_backward import Unit, summed_apart
from ppexec.stage.stage import Stage
from ppsim.errors import InputError


class _Kept(NamedTuple):
    """What is kept of a microbatch between its F and its backward; the inputs are those of all layers."""

    inputs: list[Tree]
    output: Tree
    target: Tree | None


class _Entry(torch.autograd.Function):
    """The start of a layer's graph. It takes the gradients of the layer's input as autograd delivers them.

    A leaf tensor would do this too, but autograd may bring its `.grad` into another memory layout, and kernels of the
    layer before may then add up in another order.
    """

    @staticmethod
    def forward(
        ctx: Any, input_gradients: list[torch.Tensor | None], anchor: torch.Tensor, *values: torch.Tensor
    ) -> Any:
        """The values themselves. The anchor requires a gradient, so the results do too, although the values do not."""
        ctx.input_gradients = input_gradients
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Put the gradients into the list, and end."""
        ctx.input_gradients.extend(gradients)
        return None, None, *(None for _ in gradients)


class RecomputingStage(Stage):
    """A Stage with less memory and a longer backward.

    Notes
    -----
    Each layer is recomputed on its own (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). Its saved
    tensors live while its own backward runs; between actions the layers' inputs and the stage's output are held.
    Layers are recomputed in B, or in I where the backward is split. What W needs is then kept as it is without
    recomputation (see `SplitBackward`), so no layer is computed a third time. Kernels and their order are those of a
    Stage and dropout is keyed, so gradients have the same bits.
    """

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self._kept: dict[int, _Kept] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(
        self,
        microbatch: int,
        inputs: Tree | None,
        target: Tree | None,
        *,
        split: bool = False,
        again: bool = False,
        moves: bool = False,
    ) -> torch.Tensor:
        """Compute F as a Stage does, keeping the inputs of all layers.

        `again` and `moves` are always False: a configuration has either recomputing stages, or R and O in its schedule.
        Raises InputError if a layer changes its input in place, since recomputation needs it unchanged.
        """
        if not self.trains or inputs is None:
            return super().forward(microbatch, inputs, target, split=split)
        self._announce(microbatch)
        value = self._entered(microbatch, inputs)
        inputs_of_layers: list[Tree] = []
        with torch.no_grad():
            for position, layer in enumerate(self.layers):
                inputs_of_layers.append(value)
                before = versions(value)
                value = self._layer(position, value)
                if versions(inputs_of_layers[-1]) != before:
                    raise InputError(
                        f"layer {self.first_layer + position} ({type(layer).__name__}) changes its input in place, so "
                        "it cannot be recomputed: take it without inplace=True, or do not recompute"
                    )
            if self.loss is not None and target is not None:
                self.losses[microbatch] = fitted(self._loss_of(microbatch, value, target))
        self._kept[microbatch] = _Kept(inputs_of_layers, value, target)
        if self.ledger:
            for tensor in tensors_in([inputs_of_layers, value]):
                self.ledger.hold(tensor)
        return message_of(value)

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute B: each layer again, from the last to the first, with its backward right after."""
        input_gradient = self._recompute_backward(microbatch, gradient, None)
        self._complete_gradients()
        return input_gradient

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute I as B, but keep what W needs."""
        units: list[Unit] = []
        self._units[microbatch] = units
        return self._recompute_backward(microbatch, gradient, units)

    def _recompute_backward(
        self, microbatch: int, gradient: torch.Tensor | None, units: list[Unit] | None
    ) -> torch.Tensor | None:
        inputs, output, target = self._kept.pop(microbatch)
        self._announce(microbatch)
        entering = tensors_in(inputs[0])
        gradients: Sequence[torch.Tensor | None] = []
        if self.loss is None:
            gradients = gradients_of(differentiable(tensors_in(output)), gradient)
        try:
            with summed_apart(self._used_by_several_layers):
                gradients, is_reached = self._through_layers(microbatch, inputs, target, gradients, units)
        except Exception as error:
            reraise(error, f"the backward of stage {self.index}")
        if self.ledger:
            for tensor in tensors_in(output):
                self.ledger.drop(tensor)
        if self.is_first:
            return None
        leaves = differentiable(entering)
        found = gradients if is_reached else [None] * len(leaves)
        each = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        return pack(each, entering[0].device)

    @cached_property
    def _used_by_several_layers(self) -> list[nn.Parameter]:
        """Parameters that several layers of the stage share."""
        uses = Counter(parameter for layer in self.layers for parameter in layer.parameters())
        return [parameter for parameter, times in uses.items() if times > 1]

    def _through_layers(
        self,
        microbatch: int,
        inputs: list[Tree],
        target: Tree | None,
        gradients: Sequence[torch.Tensor | None],
        units: list[Unit] | None,
    ) -> tuple[Sequence[torch.Tensor | None], bool]:
        """Recompute each layer, from the last to the first, with its backward right after.

        Returns the gradients of the first layer's input, and whether any gradient has reached it.
        """
        is_reached = True
        for position in reversed(range(len(self.layers))):
            value = inputs.pop()
            if is_reached:
                graph_input, input_gradients = self._graph_input(position, value)
                result = self._run(microbatch, position, graph_input, target, units)
                if position == len(self.layers) - 1 and self.loss is not None:
                    roots, gradients = [result], [self._loss_gradient(microbatch, result)]
                else:
                    roots = differentiable(tensors_in(result))
                pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if r.requires_grad and g is not None]
                if pairs:
                    torch.autograd.backward([root for root, _ in pairs], [given for _, given in pairs])
                gradients = (
                    input_gradients if position else [leaf.grad for leaf in differentiable(tensors_in(graph_input))]
                )
                is_reached = any(each is not None for each in gradients)
                del result, roots, pairs
            if self.ledger:
                for tensor in tensors_in(value):
                    self.ledger.drop(tensor)
        return gradients, is_reached

    def _graph_input(self, position: int, value: Tree) -> tuple[Tree, list[torch.Tensor | None]]:
        """A layer's input as the start of a graph, and the list that gets the gradients of its differentiable tensors.

        The input of the stage's first layer has leaves, whose gradients are in `.grad`, as in a Stage.
        """
        leaves, tree = pytree.tree_flatten(value)
        tensors = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and differentiable([leaf])]
        input_gradients: list[torch.Tensor | None] = []
        if position and places:
            entered = _Entry.apply(input_gradients, self._anchor, *(leaves[at] for at in places))
            for at, tensor in zip(places, entered, strict=True):
                tensors[at] = tensor
        elif not position and not self.is_first:
            for at in places:
                tensors[at].requires_grad_()
        return pytree.tree_unflatten(tensors, tree), input_gradients

    def _run(self, microbatch: int, position: int, value: Tree, target: Tree | None, units: list[Unit] | None) -> Tree:
        """A layer's forward with its graph, followed by the loss if it is the model's last layer."""
        # In B a layer's saved tensors are gone before the action ends. Only what I leaves to W is counted.
        saving = self.ledger.saving() if self.ledger and units is not None else nullcontext()
        cutting: AbstractContextManager[list[Unit]] = nullcontext([])
        if units is not None:
            cutting = self._split.recording(self.ledger)
        with saving, cutting as found:
            root = self._layer(position, value)
            if position == len(self.layers) - 1 and self.loss is not None and target is not None:
                root = self._loss_of(microbatch, root, target)
        if units is not None:
            units[:0] = found  # in the order of the layers, though they are recomputed from the last
        return root

    def clear(self) -> None:
        """Forget gradients, losses and all microbatches."""
        super().clear()
        self._kept.clear()
