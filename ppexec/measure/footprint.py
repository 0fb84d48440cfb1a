"""Footprint: the bytes that a stage holds, counted on the stage as a whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ppexec.models.shapes import Tree
from ppexec.stage.ledger import Ledger, gradient_bytes, parameter_bytes
from ppexec.stage.stage import Stage

Make = Callable[[], "Tree | None"]
"""Makes a value anew at each call."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The bytes of one microbatch on a stage, and of the stage's parameters.

    They are not the sum of the layers' bytes: an output inside a stage is held only if some backward needs it, and
    layers may share storages.

    Parameters
    ----------
    activation_bytes : int
        Held from F to B, or to I.
    weight_activation_bytes : int
        Held from I to W.
    recompute_bytes : int
        Held from F to R.
    parameter_bytes : int
        All parameters.
    gradient_bytes : int
        Gradients of the parameters that a backward reaches.
    older : tuple of UntypedStorage
        Storages that outlive a microbatch and are no attribute of a module, such as a table that a layer keeps in a
        dictionary. They are not activations.
    """

    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    recompute_bytes: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    older: tuple[torch.UntypedStorage, ...] = field(default=(), repr=False, compare=False)

    def amounts(self) -> dict[str, int]:
        """The bytes by name, as StageCost names them."""
        return {name: value for name, value in vars(self).items() if name.endswith("_bytes")}


def measure_footprint(
    stage: Stage,
    inputs: Make,
    gradient: Make,
    target: Tree | None,
    older: Iterable[torch.Tensor],
    *,
    split: bool,
) -> Footprint:
    """Count a stage's bytes by running one microbatch through it four times.

    The first pass finds the storages that outlive it. The second and third count, with B and with I and W, and the last
    what an F keeps for its R. Afterwards the stage's parameters have no gradients, and its layers are as before.

    Parameters
    ----------
    stage : Stage
        The stage.
    inputs : callable
        Makes the stage's input anew.
    gradient : callable
        Makes the gradient of its output anew; gives None for the last stage.
    target : Tensor or None
        The target of the loss, for the last stage.
    older : iterable of Tensor
        Tensors that exist before the step. They are not activations.
    split : bool
        Whether the run splits this stage's backwards into I and W, for which F keeps other tensors.

    Returns
    -------
    Footprint
    """
    parameters = parameter_bytes(stage.layers)
    if not stage.trains:
        return Footprint(parameter_bytes=parameters)
    older = list(older)
    alone = stage.part(0, len(stage.layers), copies_input=stage.copies_input)
    alone.clear()

    def forward(ledger: Ledger, *, split: bool, again: bool = False) -> int:
        alone.ledger = ledger
        alone.forward(0, inputs(), target, split=split, again=again)
        return ledger.level_bytes

    ledger = Ledger(older, remembers=True)
    forward(ledger, split=False)
    alone.backward(0, gradient())
    gradients = gradient_bytes(alone.layers)
    alone.clear()
    gc.collect()
    survivors = tuple(ledger.survivors())

    ledger = Ledger([*older, *survivors])
    whole = forward(ledger, split=False)
    alone.backward(0, gradient())
    whole_split = forward(ledger, split=True)
    alone.backward_input(0, gradient())
    kept = ledger.level_bytes
    alone.backward_weight(0)
    until_again = forward(Ledger([*older, *survivors]), split=split, again=True)
    alone.close()
    return Footprint(
        activation_bytes=whole_split if split else whole,
        weight_activation_bytes=kept,
        recompute_bytes=until_again,
        parameter_bytes=parameters,
        gradient_bytes=gradients,
        older=survivors,
    )
