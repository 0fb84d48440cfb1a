"""Load: a model by name, built in or the user's own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ppexec.machine.environment import memory_bytes
from ppexec.machine.frames import user_frames
from ppexec.models.gpt import gpt
from ppexec.models.mlp import mlp
from ppexec.models.model import Model
from ppexec.models.seeds import derive
from ppexec.models.ties import joined_ties, tie
from ppsim.errors import InputError

if TYPE_CHECKING:
    from ppexec.config.config import RunConfig

_BUILT_IN: dict[str, Callable[[RunConfig], Model]] = {"gpt": gpt, "mlp": mlp}


def resolve_factory(name: str) -> Callable[[RunConfig], Model]:
    """The function that builds a model.

    Parameters
    ----------
    name : str
        "mlp", "gpt" or "package.module:factory". Modules in the working directory are found too.

    Raises
    ------
    InputError
        If it is not found, with the part that is missing.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"unknown model {name!r}: take {', '.join(_BUILT_IN)} or your own as package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"model {name!r}: cannot import {module_name!r} ({error}); run where it can be found"
        ) from error
    except Exception as error:
        what = f"{module_name!r} raised {type(error).__name__}: {error}"
        raise InputError(f"model {name!r}: {what}", details=user_frames(error)) from error
    factory: Callable[[RunConfig], Model] | None = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f"model {name!r}: {module_name!r} has no function {attribute!r}: give the name of one")
    return factory


def load_model(config: RunConfig) -> Model:
    """Build the model that the configuration names, the same on every rank. Its `tied` has all ties (`joined_ties`).

    Raises
    ------
    InputError
        If the factory gives no Model, one with another number of layers than the configuration, or one whose `tied`
        cannot be tied.
    """
    # What a factory prints goes to standard error: standard output may be one JSON object.
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr):
        # Layers that draw their weights while they are built draw the same weights on every rank.
        torch.manual_seed(derive(config.seed, "model"))
        factory = resolve_factory(config.model)
        try:
            model = factory(config)
        except InputError:
            raise
        except Exception as error:
            what = f"the factory raised {type(error).__name__}: {error}"
            raise InputError(f"model {config.model!r}: {what}", details=user_frames(error)) from error
    if not isinstance(model, Model):
        raise InputError(f"model {config.model!r}: the factory must give a ppexec.Model, got {type(model).__name__}")
    if len(model.layers) != config.chain_length:
        raise InputError(
            f"model {config.model!r} has {len(model.layers)} layers, the configuration says {config.chain_length}: "
            f"pass --layers {len(model.layers)}, or build config.layers of them"
        )
    model = replace(model, tied=joined_ties(model.layers, model.tied))
    for places in model.tied:
        first, *others = (model.layers[layer].get_parameter(name) for layer, name in places)
        for other in others:
            other.requires_grad_(first.requires_grad)
    for index, layer in enumerate(model.layers):
        tie({index: layer}, model.tied)  # so that a parameter with two places in one layer counts once everywhere
    return model


def refuse_what_does_not_fit(model: Model, config: RunConfig) -> None:
    """Raise InputError if parameters and gradients exceed the machine's memory, before a process is killed for it."""
    parameters = sum(parameter.nbytes for parameter in nn.ModuleList(model.layers).parameters())
    needed, there = parameters * (1 if config.forward_only else 2), memory_bytes()
    if needed > there:
        raise InputError(
            f"parameters and gradients of {config.layers} layers take {needed / 2**30:.1f} GiB, this machine has "
            f"{there / 2**30:.1f} GiB: take a smaller hidden size or fewer layers"
        )
