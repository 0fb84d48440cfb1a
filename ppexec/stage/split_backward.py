"""Split backward: first the gradient for the input (I), later those for the weights (W).

Every module that owns parameters is a unit. In the forward its part of the graph is cut off. The graph around it has
one node instead. In I this node asks the unit for the gradient of its input only, and the unit keeps the gradient of
its output. After I all that autograd saved outside the units is free, and each unit holds what W needs: what it saved
itself (for a linear layer the input) and the gradient of its output. This is the memory that zero-bubble schedules
count on (Qi et al., 2024, section 2).

The kernels are those of a whole backward, each run once, so gradients have the same bits. A unit that computes with
more than its weights keeps all of its graph and walks it twice, which is correct but saves no memory. If it also uses
its input in several places, the input's gradient is added up in another order and may differ by a rounding.
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
    """One call of a module that owns parameters, with its graph, which is cut off from the graph around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.outer_inputs: list[torch.Tensor] = []
        self.inner_inputs: list[torch.Tensor] = []
        self.edges: list[GradientEdge] = []
        self.gradients: list[torch.Tensor | None] = []
        self.ledger: Ledger | None = None

    def input_gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the inputs, from those of the outputs, which are kept for the weights."""
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
    """The node that takes a unit's place in the graph around it."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, anchor: torch.Tensor, outputs: list[torch.Tensor], *inputs: torch.Tensor) -> Any:
        """The unit's outputs; the anchor makes them differentiable even if no input is, as on the first stage."""
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """The gradients of the unit's inputs."""
        return (None, None, None, *ctx.unit.input_gradients(gradients))


class SplitBackward:
    """Cuts off the units of some layers while `recording`, for `add_weight_gradients` to compute later.

    Parameters
    ----------
    layers : sequence of Module
        They get hooks, which `close` removes.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._recorded: list[Unit] | None = None
        self._open: list[Unit] = []
        self._ledger: Ledger | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._hooks: list[RemovableHandle] = []
        for layer in layers:
            for module in owners(layer):
                # The first and the last hook, so that what others do (DTensors in and out) is inside the unit.
                self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks from the layers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def recording(self, ledger: Ledger | None) -> Iterator[list[Unit]]:
        """A context in which forwards cut off their units; it gives the list that they are put in."""
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
        inner_of: dict[int, torch.Tensor] = {}  # one for each tensor: attention asks whether query is key

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
    """The outermost modules that own parameters directly, with everything inside them."""
    if any(True for _ in module.parameters(recurse=False)):
        return [module]
    return [owner for child in module.children() for owner in owners(child)]


def add_weight_gradients(units: Sequence[Unit]) -> None:
    """Compute W: add the gradients of all units' parameters, in one call of autograd, and release the units."""
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
