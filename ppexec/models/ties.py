"""Ties: places of the chain that hold one weight, such as a GPT's embedding and head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ppexec.models.model import Place
from ppsim.errors import InputError


def joined_ties(layers: Sequence[nn.Module], tied: Sequence[Sequence[Place]]) -> list[tuple[Place, ...]]:
    """All ties of a chain: those that a model states, and those of layers that share a module or a parameter.

    Parameters
    ----------
    layers : sequence of Module
        The chain.
    tied : sequence of sequences of places
        As in `Model`. Ties that have a place in common are one.

    Returns
    -------
    list of tuple of places
        Each weight with two or more places, in the order of the chain.

    Raises
    ------
    InputError
        For a place that is not there, or places that differ in shape or dtype.

    Examples
    --------
    >>> linear = nn.Linear(2, 2, bias=False)
    >>> joined_ties([linear, nn.ReLU(), linear, nn.Linear(2, 2)], [[(2, "weight"), (3, "weight")]])
    [((0, 'weight'), (2, 'weight'), (3, 'weight'))]
    """
    shared: dict[int, list[Place]] = defaultdict(list)
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            shared[id(parameter)].append((index, name))
    found: list[set[Place]] = []
    for stated in tied:
        if len(places := _checked(layers, stated)) < 2:
            raise InputError(f"tied: {list(stated)} is one place: give two or more, or leave it out")
        _join(found, places)
    for places in shared.values():
        if len(places) > 1:
            _join(found, places)
    position = {
        (index, name): (index, at)
        for index, layer in enumerate(layers)
        for at, (name, _) in enumerate(layer.named_parameters(remove_duplicate=False))
    }
    return [tuple(sorted(group, key=position.__getitem__)) for group in found]


def _checked(layers: Sequence[nn.Module], stated: Sequence[Place]) -> list[Place]:
    """The places of a tie, each once. Raises InputError if they cannot be tied."""
    places: list[Place] = []
    for place in stated:
        try:
            layer, name = place
        except (TypeError, ValueError):
            raise InputError(f"tied: {place!r} is no place: give (layer, parameter name)") from None
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(layers):
            raise InputError(f"tied: there is no layer {layer!r}: the chain has layers 0 to {len(layers) - 1}")
        there = dict(layers[layer].named_parameters(remove_duplicate=False))
        if name not in there:
            raise InputError(
                f"tied: layer {layer} ({type(layers[layer]).__name__}) has no parameter {name!r}: it has "
                f"{', '.join(there) or 'none'}"
            )
        first, other = layers[places[0][0]].get_parameter(places[0][1]) if places else there[name], there[name]
        if (first.shape, first.dtype) != (other.shape, other.dtype):
            raise InputError(
                f"layer {places[0][0]} {places[0][1]} and layer {layer} {name} are tied, but are {list(first.shape)} "
                f"{first.dtype} and {list(other.shape)} {other.dtype}: make them alike"
            )
        if (layer, name) not in places:
            places.append((layer, name))
    return places


def _join(found: list[set[Place]], places: Iterable[Place]) -> None:
    """Add a tie to those found so far, joined with those that it meets."""
    group = set(places)
    for other in [each for each in found if each & group]:
        group |= other
        found.remove(other)
    found.append(group)


def places_by_stage(places: Sequence[Place], stage_of: Sequence[int]) -> dict[int, list[Place]]:
    """The places of a tie on each stage that has any. stage_of: the stage of each layer."""
    found: dict[int, list[Place]] = defaultdict(list)
    for layer, name in places:
        found[stage_of[layer]].append((layer, name))
    return dict(found)


def put_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of another."""
    path, _, last = name.rpartition(".")
    setattr(layer.get_submodule(path), last, parameter)


def tie(layers: Mapping[int, nn.Module], tied: Sequence[Sequence[Place]]) -> None:
    """Give all places of a tie that some layers hold one parameter, that of the first of them."""
    for places in tied:
        held = [place for place in places if place[0] in layers]
        for layer, name in held[1:]:
            put_parameter(layers[layer], name, layers[held[0][0]].get_parameter(held[0][1]))


def tied_over_stages(tied: Iterable[Sequence[Place]], stage_of_layers: Sequence[int]) -> set[Place]:
    """The places whose gradients are added up over several stages.

    Parameters
    ----------
    tied : iterable of sequences of places
        As in `Model`.
    stage_of_layers : sequence of int, shape (layers,)
        Stage of each layer.
    """
    return {place for places in tied if len(places_by_stage(places, stage_of_layers)) > 1 for place in places}
