"""Split: a backward in two halves, the gradient for the input first and those for the weights later.

Every module that owns parameters is a unit. In the forward its part of the graph is cut off and kept for itself: the
graph around it sees one node, whose backward asks the unit for the gradient of its input alone and keeps the gradient
of its output. So when the first half is over, everything that autograd had saved around the units is free, and for
each unit there is left what the second half needs: what it saved itself (the input, for a linear layer) and the
gradient of its output; this is the memory that the zero-bubble papers count on (Qi et al., 2024, section 2). The
kernels are those of the whole backward, each run once, so gradients have the same bits. A unit that computes with more
than its weights keeps all of its own graph and walks it twice: correct, but not smaller; and if it uses its input in
several places, that input's gradient is added up in another order, a rounding off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ppexec.stage.ledger import Ledger


class Unit:
    """One call of a module that owns parameters: its own graph, cut off from the one around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.outer_inputs: list[torch.Tensor] = []
        self.inner_inputs: list[torch.Tensor] = []
        self.edges: list[GradientEdge] = []
        self.gradients: list[torch.Tensor | None] = []
        self.ledger: Ledger | None = None

    def input_gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the inputs; those of the outputs are kept for the weights."""
        self.gradients = list(gradients)
        if self.ledger:
            for gradient in self._given():
                self.ledger.hold(gradient)
        inner, self.inner_inputs = self.inner_inputs, []
        reached = [
            (edge, gradient) for edge, gradient in zip(self.edges, gradients, strict=True) if gradient is not None
        ]
        if not inner or not reached:
            return [None] * len(inner)
        edges, given = zip(*reached, strict=True)
        return list(torch.autograd.grad(edges, inner, given, retain_graph=True, allow_unused=True))

    def _given(self) -> list[torch.Tensor]:
        return [gradient for gradient in self.gradients if gradient is not None]

    def release(self) -> None:
        """Forget the graph and the gradients."""
        if self.ledger:
            for gradient in self._given():
                self.ledger.drop(gradient)
        self.edges, self.gradients = [], []


class _Cut(torch.autograd.Function):
    """The node that stands for a unit in the graph around it."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, anchor: torch.Tensor, outputs: list[torch.Tensor], *inputs: torch.Tensor) -> Any:
        """The unit's outputs; the anchor makes them differentiable where no input is, as on the first stage."""
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """The gradients of the unit's inputs."""
        return (None, None, None, *ctx.unit.input_gradients(gradients))


class SplitBackward:
    """Cuts the units of some layers off while `recording`, and computes their weights' gradients when told to."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._recorded: list[Unit] | None = None
        self._open: list[Unit] = []
        self._ledger: Ledger | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._hooks: list[RemovableHandle] = []
        for layer in layers:
            for module in owners(layer):
                # First and last of all hooks, so that what others do (DTensors in and out) is inside the unit.
                self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def close(self) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def recording(self, ledger: Ledger | None) -> Iterator[list[Unit]]:
        """Inside, a forward cuts its units off; gives the list they are put in."""
        self._recorded, self._ledger = [], ledger
        try:
            yield self._recorded
        finally:
            self._recorded = None
            self._open.clear()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._recorded is None:
            return None
        unit = Unit(module)
        unit.ledger = self._ledger
        self._open.append(unit)
        inner_of: dict[int, torch.Tensor] = {}  # one for one: attention computes otherwise where query is not key

        def cut(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                return value
            if id(value) not in inner_of:
                inner_of[id(value)] = inner = value.detach().requires_grad_()
                unit.outer_inputs.append(value)
                unit.inner_inputs.append(inner)
            return inner_of[id(value)]

        return pytree.tree_map(cut, (arguments, named))

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if self._recorded is None:
            return None
        unit = self._open.pop()
        leaves, structure = pytree.tree_flatten(output)
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        outer, unit.outer_inputs = unit.outer_inputs, []
        if not places:
            return None
        outputs = [leaves[at] for at in places]
        unit.edges = [get_gradient_edge(output) for output in outputs]
        self._recorded.append(unit)
        for at, joined in zip(places, _Cut.apply(unit, self._anchor, outputs, *outer), strict=True):
            leaves[at] = joined
        return pytree.tree_unflatten(leaves, structure)


def owners(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that own parameters directly; everything inside one belongs to it."""
    if any(True for _ in module.parameters(recurse=False)):
        return [module]
    return [owner for child in module.children() for owner in owners(child)]


def add_weight_gradients(units: Sequence[Unit]) -> None:
    """The second half: add the gradients of all units' parameters, in one call of autograd; then forget the units."""
    edges: list[GradientEdge] = []
    gradients: list[torch.Tensor] = []
    parameters: dict[int, nn.Parameter] = {}
    for unit in units:
        for edge, gradient in zip(unit.edges, unit.gradients, strict=True):
            if gradient is not None:
                edges.append(edge)
                gradients.append(gradient)
        parameters.update({id(p): p for p in unit.module.parameters() if p.requires_grad})
    if edges and parameters:
        # Through autograd's own accumulation, so that hooks on parameters (data parallelism) fire.
        torch.autograd.backward(edges, gradients, inputs=list(parameters.values()))
    for unit in units:
        unit.release()
