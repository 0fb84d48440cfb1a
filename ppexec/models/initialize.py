"""Initialize: a layer's parameters from (seed, layer, name) alone."""

from __future__ import annotations

import torch
from torch import nn

from ppexec.models.seeds import parameter_seed
from ppsim.errors import InputError


def initialize_layer(layer: nn.Module, *, index: int, seed: int, device: torch.device) -> nn.Module:
    """Make a layer real on a device, with every parameter drawn from a random stream of its own.

    Parameters
    ----------
    layer : Module
        On the meta device, or real already.
    index : int
        Its position in the model's chain.
    seed : int
        The run's.
    device : torch.device
        Where it goes. Values are drawn on the CPU, since a GPU draws others.

    Returns
    -------
    Module
        The same layer.

    Raises
    ------
    InputError
        For a parameter or buffer on the meta device that no module can fill.

    Notes
    -----
    A parameter is drawn by the outermost module around it that has `reset_parameters()`, seeded by (seed, layer,
    name). Only that parameter is kept of the draw. A parameter without such a module keeps the value from the factory,
    which is the same on every rank.
    """
    stateless = [name for name, parameter in layer.named_parameters() if parameter.is_meta and not _owner(layer, name)]
    stateless += [name for name, buffer in layer.named_buffers() if buffer.is_meta]
    if stateless:
        raise InputError(
            f"layer {index} ({type(layer).__name__}) has {stateless[0]!r} on the meta device and no reset_parameters() "
            "that would fill it: add one to the module that owns it, or build the layer on the CPU"
        )
    on_meta = any(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device="cpu") if on_meta else layer.to("cpu")
    drawn: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        for name, parameter in layer.named_parameters():
            owner = _owner(layer, name)
            if owner is not None:
                torch.default_generator.manual_seed(parameter_seed(seed, layer=index, name=name))
                owner.reset_parameters()  # type: ignore[operator]
                drawn[name] = parameter.detach().clone()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in drawn:
                parameter.copy_(drawn[name])
    return layer.to(device)


def _owner(layer: nn.Module, name: str) -> nn.Module | None:
    """The outermost module on the way to a parameter that can draw it."""
    module = layer
    for part in [*name.split(".")[:-1], ""]:
        if callable(getattr(module, "reset_parameters", None)):
            return module
        if part:
            module = getattr(module, part)
    return None
