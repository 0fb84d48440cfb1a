"""Split backward: first the gradient for the input (I), later those for the weights (W).

Every module that owns parameters is a unit. In the forward its part of the graph is cut off. The graph around it has
one node instead. In I this node asks the unit for the gradient of its input only, and the unit keeps the gradient of
its output. After I all that autograd saved outside the units is free, and each unit holds what W needs: what it saved
itself (for a linear layer the input) and the gradient of its output. This is the memory that zero-bubble schedules
count on (Qi et al., 2024, section 2).

The kernels are those of a whole backward, each run once, so gradients have the same bits. A unit that computes with
more than its weights keeps all of its graph and walks it twice, which is correct but saves no memory. If it also uses
its input in several places, the input's gradient is added up in another order and may differ by a rounding.

A unit whose graph has an autograd function written in Python (a fused kernel, reentrant checkpointing, a compiled
module) is opaque: its backward may do more than compute gradients, so it runs once. I then computes the gradients of
the weights too, and they are kept until W adds them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ppexec.stage.ledger import Ledger

_MAY_RUN_TWICE = ("torch.distributed.", "ppexec.")  # modules of autograd functions that only compute gradients


class Unit:
    """One call of a module that owns parameters, with its graph, which is cut off from the graph around it."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.outer_inputs: list[torch.Tensor] = []
        self.inner_inputs: list[torch.Tensor] = []
        self.edges: list[GradientEdge] = []
        self.gradients: list[torch.Tensor | None] = []
        self.weight_gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.is_opaque = False
        self.ledger: Ledger | None = None

    def end(self, outputs: Sequence[torch.Tensor]) -> None:
        """Note where the backward starts."""
        self.edges = [get_gradient_edge(output) for output in outputs]
        self.gradients = [None] * len(outputs)  # until I reaches the unit, which it does only if the loss depends on it
        self.is_opaque = _has_python_function(self.edges)

    def input_gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the inputs, from those of the outputs; what the weights need is kept."""
        inner, self.inner_inputs = self.inner_inputs, []
        self.gradients = list(gradients)
        if self.is_opaque:
            return self._all_gradients(inner)
        self._hold()
        edges, given = self.reached()
        if not inner or not edges:
            return [None] * len(inner)
        return list(torch.autograd.grad(edges, inner, given, retain_graph=True, allow_unused=True))

    def _all_gradients(self, inner: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradients of the inputs, with those of the weights, which are kept."""
        edges, given = self.reached()
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if edges:
            torch.autograd.backward(edges, given)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if parameter.grad is not None:
                self.weight_gradients.append((parameter, parameter.grad))
            parameter.grad = gradient
        self.edges, self.gradients = [], []
        self._hold()
        return [tensor.grad for tensor in inner]

    def add_weight_gradients(self) -> None:
        """Compute W of this unit alone."""
        for parameter, gradient in self.weight_gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        edges, given = self.reached()
        if edges and self.parameters:
            torch.autograd.backward(edges, given, inputs=self.parameters)

    def reached(self) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        """The outputs that I has reached, and their gradients."""
        pairs = [(e, g) for e, g in zip(self.edges, self.gradients, strict=True) if g is not None]
        return [edge for edge, _ in pairs], [gradient for _, gradient in pairs]

    def _kept(self) -> list[torch.Tensor]:
        return [g for g in self.gradients if g is not None] + [g for _, g in self.weight_gradients]

    def _hold(self) -> None:
        if self.ledger:
            for gradient in self._kept():
                self.ledger.hold(gradient)

    def release(self) -> None:
        """Forget the graph and the gradients."""
        if self.ledger:
            for gradient in self._kept():
                self.ledger.drop(gradient)
        self.edges, self.gradients, self.weight_gradients = [], [], []


def _has_python_function(edges: Sequence[GradientEdge]) -> bool:
    """Whether the graph has an autograd function of Python's, other than those that may run twice."""
    seen: set[Any] = set()
    waiting: list[Any] = [edge.node for edge in edges]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            function: type = type(node)._forward_cls  # type: ignore[attr-defined]
            if not function.__module__.startswith(_MAY_RUN_TWICE):
                return True
        waiting += [following for following, _ in node.next_functions]
    return False


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
        self._open: list[Unit | None] = []  # None for a call within a unit, which is a part of it
        self._ledger: Ledger | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._hooks: list[RemovableHandle] = []
        found: dict[int, nn.Module] = {}  # each once, though a module may be listed twice
        for layer in layers:
            for module in owners(layer):
                found[id(module)] = module
        for module in found.values():
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
        if self._open:
            self._open.append(None)
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
        if unit is None:
            return None
        leaves, structure = pytree.tree_flatten(output)
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        outer, unit.outer_inputs = unit.outer_inputs, []
        if not places:
            return None
        outputs = [leaves[at] for at in places]
        unit.end(outputs)
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
    """Compute W: add the gradients of all units' parameters, and release the units.

    Parameters
    ----------
    units : sequence of Unit
        In the order of their calls.
    """
    parameters = {id(parameter): parameter for unit in units for parameter in unit.parameters}
    uses = Counter(id(parameter) for unit in units for parameter in unit.parameters)
    if any(unit.is_opaque for unit in units) or max(uses.values(), default=0) > 1:
        with summed_apart(parameters.values()):
            for unit in reversed(units):
                unit.add_weight_gradients()
    else:
        reached = [unit.reached() for unit in units]
        edges = [edge for found, _ in reached for edge in found]
        if edges and parameters:
            # Through autograd's own accumulation, so that hooks on parameters (data parallelism) fire.
            given = [gradient for _, found in reached for gradient in found]
            torch.autograd.backward(edges, given, inputs=list(parameters.values()))
    for unit in units:
        unit.release()


@contextlib.contextmanager
def summed_apart(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A context whose gradients are added up by themselves first, and then to those that are there.

    This is the order in which one backward adds up the gradients of a parameter that it reaches several times.
    """
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.grad = None
    yield
    for parameter, gradient in before:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
