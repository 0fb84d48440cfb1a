"""Layer samples: what a round of a profile measured on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ppexec.machine.device import Mark
from ppsim import Kind

LAYER_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")  # recomputing is a stage's
FIELD_OF_KIND = {
    Kind.F: "forward_s",
    Kind.B: "backward_s",
    Kind.I: "backward_input_s",
    Kind.W: "backward_weight_s",
    Kind.R: "recompute_s",
}
STAGE_TIMES = tuple(FIELD_OF_KIND.values())


class Span(NamedTuple):
    """When an action began and ended, by the device's clock. number: of the stage, or of the layer."""

    kind: Kind
    number: int
    microbatch: int
    begin: Mark
    end: Mark


class CopySpan(NamedTuple):
    """When a copy to host memory, or from it, began and ended, by the device's clock."""

    size_bytes: int
    begin: Mark
    end: Mark


@dataclass(kw_only=True)
class RoundTimes:
    """What a round notes: every action of whole stages and of layers, and every copy."""

    stages: list[Span] = field(default_factory=list)
    layers: list[Span] = field(default_factory=list)
    copies: list[CopySpan] = field(default_factory=list)


@dataclass(kw_only=True)
class LayerSamples:
    """What one round measured on one rank.

    Attributes
    ----------
    seconds : dict
        Field of LayerCost -> layer -> seconds of each microbatch.
    stage_seconds : dict
        Field of StageCost -> stage -> seconds of each microbatch.
    sizes : dict
        Layer -> field of LayerCost -> bytes of microbatch 0 of the first round, of the layer as a stage of its own.
    stage_sizes : dict
        Stage -> field of StageCost -> bytes of microbatch 0.
    by_shape : dict
        Input shape (see `Batch.shapes`) -> `stage_seconds` of the microbatches with it, and their `stage_sizes` with
        the bytes of messages.
    copy_seconds : dict
        Size in bytes -> seconds of each copy of that size, to host memory or back.
    """

    seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in LAYER_TIMES})
    stage_seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in STAGE_TIMES})
    sizes: dict[int, dict[str, int | None]] = field(default_factory=dict)
    stage_sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    by_shape: dict[str, tuple[dict[str, dict[int, list[float]]], dict[int, dict[str, int | None]]]] = field(
        default_factory=dict
    )
    copy_seconds: dict[int, list[float]] = field(default_factory=dict)
