"""Tied: one weight in two places of the chain, such as a GPT's embedding and head.

In a pipeline each place has its own copy. Both start as the first would, and once a step's gradients are there each
copy gets the sum of both, so that they stay equal. A process without a pipeline has one parameter, whose two uses
autograd adds up microbatch by microbatch: the same terms in another order, so equality is within rounding there.
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
    """Where a layer, real and whole, has the second of a tied pair: give it the value with which the first starts.

    Raises ValueError if two tied parameters differ in shape or dtype.
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
    """Adds up the gradients of tied copies; built by all processes at once, since they form groups.

    tied: as in Model. stage_of: layer -> stage. placement: stage -> rank. modules: the layers held here, by number.
    mesh: None if this process holds all.
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
        """Replace each copy's gradient by the sum of both."""
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
    """Makes tied places of a whole chain one parameter, and notes how large the terms of its gradient are."""

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
        """Where the parameter of a place is really held."""
        return self._first.get((layer, name), (layer, name))

    def is_tied(self, layer: int, name: str) -> bool:
        """Whether it has a second use."""
        return (layer, name) in self._first

    def renew(self) -> None:
        """Before each forward: the second place uses the first's parameter, as a view of it."""
        for parameter, module, name in self._uses:
            view = parameter.view_as(parameter)
            if view.requires_grad:
                self._note(view, parameter, 2)
            setattr(module, name, view)

    def _note(self, use: torch.Tensor, parameter: nn.Parameter, times: int) -> None:
        """Count a gradient's magnitude.

        Of a microbatch's two terms a + b the sum is known and b: |a| + |b| <= |a + b| + 2 |b|.
        """

        def hook(gradient: torch.Tensor) -> None:
            magnitude = times * gradient.double().abs()
            self._terms[parameter] = self._terms.get(parameter, torch.zeros_like(magnitude)) + magnitude

        use.register_hook(hook)

    def magnitude(self, parameter: nn.Parameter) -> torch.Tensor:
        """The sum of the magnitudes of all terms since `clear`, in float64, element by element."""
        blank = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        return self._terms.get(parameter, blank)

    def clear(self) -> None:
        """Start anew."""
        self._terms.clear()
