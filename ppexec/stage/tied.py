"""Tied: one weight in several places of the chain, such as a GPT's embedding and head.

In a pipeline the places of one stage have one parameter, and each stage has its own copy. All start with the value of
the first place. At the end of a step each copy gets the sum of all copies' gradients, so they stay equal. One process
without a pipeline has a single parameter, and autograd adds up the gradients of its uses microbatch by microbatch. The
terms are the same in another order, so the sums are equal within rounding, and bit-equal if one stage has all places.
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
from ppexec.models.ties import places_by_stage, put_parameter, tie
from ppexec.stage.tensor_parallel import local, placements, shard_layer
from ppsim.errors import InputError


def build_layers(
    model: Model, layers: range, *, seed: int, device: torch.device, mesh: DeviceMesh | None = None
) -> list[nn.Module]:
    """Build the layers of a stage: real, initialised, sharded and tied among themselves.

    Parameters
    ----------
    model : Model
        The whole chain, as `load_model` gives it.
    layers : range
        The stage's. They are the model's own modules, or copies if they share something with other stages.
    seed, device
        As for `initialize_layer`.
    mesh : DeviceMesh, optional
        Of the tp dimension. Each layer is sharded over it as soon as it is real, so only one is ever whole.

    Returns
    -------
    list of Module

    Raises
    ------
    InputError
        If tied parameters are sharded in different ways.
    """
    own = _apart(model, layers)
    modules: dict[int, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    for index, layer in zip(layers, own, strict=True):
        if id(layer) not in made:
            whole = initialize_layer(layer, index=index, seed=seed, device=device)
            _start_tied(whole, model, index=index, layers=layers, seed=seed, device=device)
            made[id(layer)] = shard_layer(whole, model, mesh, index=index)
        modules[index] = made[id(layer)]
    for places in model.tied:
        held = [place for place in places if place[0] in layers]
        for place in held[1:]:
            _check_alike(held[0], place, modules)
    tie(modules, model.tied)
    return list(modules.values())


def _parameter(model: Model, place: Place) -> nn.Parameter:
    return model.layers[place[0]].get_parameter(place[1])


def _check_alike(first: Place, other: Place, modules: Mapping[int, nn.Module]) -> None:
    ways = [placements(modules[layer].get_parameter(name)) for layer, name in (first, other)]
    if ways[0] != ways[1]:
        raise InputError(_sharded_apart([first, other], " and ".join(ways)))


def _sharded_apart(places: Sequence[Place], ways: str) -> str:
    where = " and ".join(f"layer {layer} {name}" for layer, name in places)
    return f"{where} are tied, but sharded as {ways}: give them the same style in the plan"


def _apart(model: Model, layers: range) -> list[nn.Module]:
    """A stage's layers, which share no module or parameter with other stages, nor a parameter among themselves."""
    own = [model.layers[index] for index in layers]
    elsewhere = {
        id(part)
        for index, layer in enumerate(model.layers)
        if index not in layers
        for part in (*layer.modules(), *layer.parameters())
    }
    if any(id(part) in elsewhere for layer in own for part in (*layer.modules(), *layer.parameters())):
        own = copy.deepcopy(own, {id(model.randomness): model.randomness})
    taken: set[int] = set()
    for layer in {id(layer): layer for layer in own}.values():
        for name, parameter in list(layer.named_parameters()):
            if id(parameter) in taken:  # a layer initialises its own, which must not change that of another
                put_parameter(layer, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            taken.add(id(parameter))
    return own


def _start_tied(layer: nn.Module, model: Model, *, index: int, layers: range, seed: int, device: torch.device) -> None:
    """Give the tied parameters of a layer the value of their first place, if that is on another stage."""
    for places in model.tied:
        held = [place for place in places if place[0] in layers]
        if not held or held[0] == places[0] or held[0][0] != index:
            continue
        first, name = places[0]
        start = _parameter(model, places[0])
        if placements(start):
            start = start.full_tensor()  # type: ignore[attr-defined]
        else:
            alike = initialize_layer(copy.deepcopy(model.layers[first]), index=first, seed=seed, device=device)
            start = alike.get_parameter(name)
        with torch.no_grad():
            layer.get_parameter(held[0][1]).copy_(start)


class TiedGradients:
    """Adds up the gradients of tied copies. All processes must build it together, since it forms groups.

    Parameters
    ----------
    tied : sequence of sequences of places
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
        tied: Sequence[Sequence[Place]],
        *,
        stage_of: Sequence[int],
        placement: Sequence[int],
        modules: Mapping[int, nn.Module],
        mesh: DeviceMesh | None,
    ) -> None:
        self._sums: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
        for places in tied:
            by_stage = places_by_stage(places, stage_of)
            if len(by_stage) == 1:
                continue
            firsts = [each[0] for each in by_stage.values()]
            held = [modules[layer].get_parameter(name) for layer, name in firsts if layer in modules]
            ranks = sorted({placement[stage] for stage in by_stage})
            group = None
            if len(ranks) > 1 and mesh is not None:
                for line in pipelines_of(mesh):
                    made = dist.new_group([line[rank] for rank in ranks])
                    if dist.get_rank() in (line[rank] for rank in ranks):
                        group = made
            if group is not None and placements(held[0]):
                ways: list[str] = [""] * len(ranks)
                dist.all_gather_object(ways, placements(held[0]), group=group)
                if len(set(ways)) > 1:
                    raise InputError(_sharded_apart(firsts, " and ".join(sorted(set(ways)))))
            if held:
                self._sums.append((held, group))

    def add(self) -> None:
        """Replace each copy's gradient by the sum of all. Collective where the copies are in several processes."""
        for parameters, group in self._sums:
            if not parameters[0].requires_grad:
                continue
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total = gradients[0]
            for gradient in gradients[1:]:
                total = total + gradient
            if group is not None:
                dist.all_reduce(local(total), group=group)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if gradient is total else gradient.copy_(total)


class SharedWeights:
    """Makes the tied places of a whole chain one parameter, and records the magnitudes of its gradient's terms.

    Parameters
    ----------
    layers : sequence of Module
        The whole chain, built stage by stage (`build_layers`). Places on other stages than the first lose their own
        parameter.
    tied : sequence of sequences of places
        As in Model.
    stage_of : sequence of int, shape (layers,)
        The stage of each layer.
    """

    def __init__(
        self, layers: Sequence[nn.Module], tied: Sequence[Sequence[Place]], *, stage_of: Sequence[int]
    ) -> None:
        self._first: dict[Place, Place] = {}
        self._stages: dict[Place, int] = {}
        self._uses: list[tuple[nn.Parameter, Place, list[tuple[nn.Module, str]]]] = []
        self._terms: dict[Place, torch.Tensor] = {}
        for places in tied:
            by_stage = places_by_stage(places, stage_of)
            first = places[0]
            for place in places:
                self._first[place], self._stages[place] = first, len(by_stage)
            parameter = layers[first[0]].get_parameter(first[1])
            for stage, here in by_stage.items():
                if stage == stage_of[first[0]]:
                    continue
                owners = []
                for layer, name in here:
                    path, _, last = name.rpartition(".")
                    module = layers[layer].get_submodule(path)
                    module._parameters.pop(last, None)  # gone already if the module is listed twice
                    owners.append((module, last))
                self._uses.append((parameter, first, owners))
            if parameter.requires_grad and len(by_stage) > 1:
                self._note(parameter, first, 1)

    def place(self, layer: int, name: str) -> Place:
        """The place that holds the parameter: the first of a tie, else the same place."""
        return self._first.get((layer, name), (layer, name))

    def stages(self, layer: int, name: str) -> int:
        """The number of stages that have the parameter."""
        return self._stages.get((layer, name), 1)

    def renew(self) -> None:
        """Give the places on other stages a new view of the first's parameters, as each forward needs."""
        for parameter, first, owners in self._uses:
            view = parameter.view_as(parameter)
            if view.requires_grad:
                self._note(view, first, 2)
            for module, name in owners:
                setattr(module, name, view)

    def _note(self, use: torch.Tensor, first: Place, times: int) -> None:
        """Add up the magnitudes of a gradient's terms, one for each stage.

        Of a microbatch's terms a, b, c, ... only the sum of all, b, c, ... are seen, so the sum of their magnitudes is
        bounded by |a + b + c + ...| + 2 (|b| + |c| + ...).
        """
        # Autograd holds the hook, out of the garbage collector's sight. If the hook held this object or the parameter,
        # the whole chain would stay for ever.
        terms = self._terms

        def hook(gradient: torch.Tensor) -> None:
            magnitude = times * gradient.double().abs()
            terms[first] = terms.get(first, torch.zeros_like(magnitude)) + magnitude

        use.register_hook(hook)

    def magnitude(self, first: Place) -> torch.Tensor | None:
        """The sum of the magnitudes of all terms since `clear`, in float64, for each element; None without terms.

        first: the place that holds the parameter.
        """
        return self._terms.get(first)

    def clear(self) -> None:
        """Forget the terms so far."""
        self._terms.clear()
