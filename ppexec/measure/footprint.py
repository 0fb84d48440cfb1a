"""Footprint: what a stage as cut holds, counted on the stage itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ppexec.models.shapes import Tree
from ppexec.stage.ledger import Ledger, gradient_bytes, parameter_bytes
from ppexec.stage.stage import Stage

Make = Callable[[], "Tree | None"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A stage's bytes: those of a microbatch, whole and between I and W, and those of its parameters.

    Layers' bytes do not simply add up to these: a boundary inside a stage is held only if some backward needs it, and
    layers may share storages. gradient_bytes: of the parameters that a backward reaches. older: storages that no
    module's attributes show and that outlive a microbatch, such as a table that a layer keeps in a dictionary.
    """

    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    older: tuple[torch.UntypedStorage, ...] = field(default=(), repr=False, compare=False)

    def amounts(self) -> dict[str, int]:
        """The bytes alone, by field of StageCost."""
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
    """Run one microbatch through a stage, three times: to see what outlives it, then to count.

    inputs, gradient: make the stage's input and its output's gradient anew. older: tensors that are there before the
    step. split: whether the stage's backwards come in two halves, for which its forward keeps other nodes. The stage's
    parameters are left without gradients, its layers as they were.
    """
    parameters = parameter_bytes(stage.layers)
    if not stage.trains:
        return Footprint(parameter_bytes=parameters)
    older = list(older)
    alone = stage.part(0, len(stage.layers), copies_input=stage.copies_input)
    alone.clear()

    def forward(ledger: Ledger, *, split: bool) -> int:
        alone.ledger = ledger
        alone.forward(0, inputs(), target, split=split)
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
    alone.close()
    return Footprint(
        activation_bytes=whole_split if split else whole,
        weight_activation_bytes=kept,
        parameter_bytes=parameters,
        gradient_bytes=gradients,
        older=survivors,
    )
