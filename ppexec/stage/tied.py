"""Tied: one weight in two places of the chain, such as a GPT's embedding and head.

In a pipeline each place has its own copy. Both start with the value of the first. At the end of a step each copy gets
the sum of both gradients, so they stay equal. One process without a pipeline has a single parameter, and autograd adds
up the gradients of its two uses microbatch by microbatch. The terms are the same in another order, so the sums are
equal within rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import pipelines_of
from ppexec.models.initialize import initialize_layer
from ppexec.models.model import Model, Place
from ppexec.stage.tensor_parallel import local


def start_tied(layer: nn.Module, model: Model, *, index: int, seed: int, device: torch.device) -> None:
    """Give the second parameter of each tied pair in a layer the value with which the first one starts.

    Parameters
    ----------
    layer : Module
        Real and whole.
    model : Model
        Has the pairs.
    index : int
        The layer's position in the chain.
    seed, device
        As for `initialize_layer`.

    Raises
    ------
    ValueError
        If two tied parameters differ in shape or dtype.
    """
    for (first, name), (second, other) in model.tied:
        if second != index:
            continue
        parameter = layer.get_parameter(other)
        alike = initialize_layer(copy.deepcopy(model.layers[first]), index=first, seed=seed, device=device)
        start = alike.get_parameter(name)
        if (start.shape, start.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"layer {first} {name} and layer {second} {other} are tied, but are {list(start.shape)} {start.dtype} "
                f"and {list(parameter.shape)} {parameter.dtype}: make them alike"
            )
        with torch.no_grad():
            parameter.copy_(start)


class TiedGradients:
    """Adds up the gradients of tied copies. All processes must build it together, since it forms groups.

    Parameters
    ----------
    tied : sequence of pairs
        As in Model.
    stage_of : sequence of int, shape (layers,)
        The stage of each layer.
    placement : sequence of int, shape (stages,)
        The rank of each stage.
    modules : mapping from layer to Module
        The layers that this process holds.
    mesh : DeviceMesh or None
        None if this process holds all ranks.
    """

    def __init__(
        self,
        tied: Sequence[tuple[Place, Place]],
        *,
        stage_of: Sequence[int],
        placement: Sequence[int],
        modules: Mapping[int, nn.Module],
        mesh: DeviceMesh | None,
    ) -> None:
        self._sums: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
        for pair in tied:
            held = [modules[layer].get_parameter(name) for layer, name in pair if layer in modules]
            ranks = [placement[stage_of[layer]] for layer, _ in pair]
            group = None
            if ranks[0] != ranks[1] and mesh is not None:
                for line in pipelines_of(mesh):
                    made = dist.new_group([line[rank] for rank in ranks])
                    if dist.get_rank() in (line[rank] for rank in ranks):
                        group = made
            if held:
                self._sums.append((held, group))

    def add(self) -> None:
        """Replace each copy's gradient by the sum of both. Collective where the copies are in two processes."""
        for parameters, group in self._sums:
            if not parameters[0].requires_grad:
                continue
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total = gradients[0] if group is not None else gradients[0] + gradients[1]
            if group is not None:
                dist.all_reduce(local(total), group=group)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if gradient is total else gradient.copy_(total)


class SharedWeights:
    """Makes the tied places of a whole chain one parameter, and records the magnitudes of its gradient's terms.

    Parameters
    ----------
    layers : sequence of Module
        The whole chain. The second place of each pair loses its own parameter.
    tied : sequence of pairs
        As in Model.
    """

    def __init__(self, layers: Sequence[nn.Module], tied: Sequence[tuple[Place, Place]]) -> None:
        self._first: dict[Place, Place] = {}
        self._uses: list[tuple[nn.Parameter, nn.Module, str]] = []
        self._terms: dict[nn.Parameter, torch.Tensor] = {}
        for first, second in tied:
            self._first[first] = self._first[second] = first
            parameter = layers[first[0]].get_parameter(first[1])
            path, _, name = second[1].rpartition(".")
            module = layers[second[0]].get_submodule(path)
            del module._parameters[name]
            self._uses.append((parameter, module, name))
            if parameter.requires_grad:
                self._note(parameter, parameter, 1)

    def place(self, layer: int, name: str) -> Place:
        """The place that holds the parameter: the first of a tied pair, else the same place."""
        return self._first.get((layer, name), (layer, name))

    def is_tied(self, layer: int, name: str) -> bool:
        """Whether the parameter has two uses."""
        return (layer, name) in self._first

    def renew(self) -> None:
        """Give the second places a new view of the first's parameters, as each forward needs."""
        for parameter, module, name in self._uses:
            view = parameter.view_as(parameter)
            if view.requires_grad:
                self._note(view, parameter, 2)
            setattr(module, name, view)

    def _note(self, use: torch.Tensor, parameter: nn.Parameter, times: int) -> None:
        """Add up the magnitudes of a gradient's terms.

        Of a microbatch's two terms a and b only a + b and b are seen, so |a| + |b| is bounded by |a + b| + 2 |b|.
        """

        def hook(gradient: torch.Tensor) -> None:
            magnitude = times * gradient.double().abs()
            self._terms[parameter] = self._terms.get(parameter, torch.zeros_like(magnitude)) + magnitude

        use.register_hook(hook)

    def magnitude(self, parameter: nn.Parameter) -> torch.Tensor:
        """The sum of the magnitudes of all terms since `clear`, in float64, for each element."""
        blank = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        return self._terms.get(parameter, blank)

    def clear(self) -> None:
        """Forget the terms so far."""
        self._terms.clear()
