"""Profile: what each layer costs, measured under the conditions of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from ppexec.clock import now_ns
from ppexec.data import Batch
from ppexec.ledger import Ledger, tensors_of
from ppexec.shapes import TensorSpec
from ppexec.stage import Stage
from ppsim import Kind, LayerCost, Program

_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")
_FIELD = {Kind.F: "forward_s", Kind.B: "backward_s", Kind.I: "backward_input_s", Kind.W: "backward_weight_s"}


@dataclass(kw_only=True)
class LayerSamples:
    """One round on one rank.

    seconds: field of LayerCost -> layer -> seconds of each microbatch. sizes: layer -> field -> bytes.
    """

    seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in _TIMES})
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)

    def add(self, kind: Kind, layer: int, elapsed_ns: int) -> None:
        """Note how long an action of this kind took on a layer."""
        self.seconds[_FIELD[kind]].setdefault(layer, []).append(elapsed_ns / 1e9)


class LayerProfiler:
    """Times one rank's layers, each as a stage of its own, in the order and memory of a run but without messages.

    boundaries: specs before each layer and after the last. Other stages' outputs and gradients are made up of noise.
    """

    def __init__(
        self, program: Program, rank: int, stages: Mapping[int, Stage], boundaries: Sequence[TensorSpec]
    ) -> None:
        self._rows = [
            (int(program.stage[row]), Kind(int(program.kind[row])), int(program.microbatch[row]))
            for row in program.rows_of(rank)
        ]
        self._split = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.W}
        self._boundaries = boundaries
        self._layers = {index: _one_by_one(stage) for index, stage in stages.items()}
        self._trains = all(stage.trains for stage in stages.values())

    def round(self, batch: Batch) -> LayerSamples:
        """Run the rank's order once, then each layer's other kind of backward and its bytes once."""
        samples = LayerSamples()
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.begin(batch)
        for stage, kind, microbatch in self._rows:
            self._run(stage, kind, microbatch, batch, samples, split=(stage, microbatch) in self._split)
        if self._trains:
            measured = {kind for _, kind, _ in self._rows}
            for stage, layers in self._layers.items():
                kinds = (Kind.B,) if Kind.I in measured else (Kind.I, Kind.W)
                only_backward = LayerSamples()
                self._run(stage, Kind.F, 0, batch, LayerSamples(), split=Kind.W in kinds)
                for kind in kinds:
                    self._run(stage, kind, 0, batch, only_backward, split=False)
                if not (Kind.B in measured and Kind.I in measured):
                    for name, found in only_backward.seconds.items():
                        samples.seconds[name].update(found)
                for layer in layers:
                    samples.sizes[layer.first_layer] = self._sizes(layer, batch)
        return samples

    def _run(
        self, stage: int, kind: Kind, microbatch: int, batch: Batch, samples: LayerSamples, *, split: bool
    ) -> None:
        layers = self._layers[stage]
        value: torch.Tensor | None = None
        if kind == Kind.F:
            value = self._input(layers[0], microbatch, batch)
        elif kind != Kind.W:
            value = self._gradient(layers[-1])
        for layer in layers if kind == Kind.F else reversed(layers):
            target = batch.targets[microbatch] if layer.loss is not None else None
            began = now_ns()
            if kind == Kind.F:
                value = layer.forward(microbatch, value, target, split=split)
            elif kind == Kind.B:
                value = layer.backward(microbatch, value)
            elif kind == Kind.I:
                value = layer.backward_input(microbatch, value)
            else:
                layer.backward_weight(microbatch)
            samples.add(kind, layer.first_layer, now_ns() - began)

    def _input(self, layer: Stage, microbatch: int, batch: Batch) -> torch.Tensor:
        return batch.inputs[microbatch] if layer.is_first else _noise(self._boundaries[layer.first_layer])

    def _gradient(self, layer: Stage) -> torch.Tensor | None:
        return None if layer.loss is not None else _noise(self._boundaries[layer.first_layer + 1])

    def _sizes(self, layer: Stage, batch: Batch) -> dict[str, int]:
        """The layer's bytes as a stage of its own: during its whole life, and between I and W."""
        layer.ledger = ledger = Ledger([*tensors_of(layer.layers), *batch.targets])
        target = batch.targets[0] if layer.loss is not None else None
        layer.forward(0, self._input(layer, 0, batch), target, split=False)
        whole = ledger.level_bytes
        layer.backward(0, self._gradient(layer))
        layer.forward(0, self._input(layer, 0, batch), target, split=True)
        layer.backward_input(0, self._gradient(layer))
        kept = ledger.level_bytes
        layer.backward_weight(0)
        layer.ledger = None
        return {
            "activation_bytes": whole,
            "weight_activation_bytes": kept,
            "output_bytes": self._boundaries[layer.first_layer + 1].size_bytes,
            "parameter_bytes": sum(p.nbytes for module in layer.layers for p in module.parameters()),
        }


def _one_by_one(stage: Stage) -> list[Stage]:
    """The layers of a stage as stages; the first takes data where the stage does, the last has its loss."""
    last = len(stage.layers) - 1
    return [
        type(stage)(
            stage.index if position == 0 else -1,
            [layer],
            first_layer=stage.first_layer + position,
            loss=stage.loss if position == last else None,
            microbatches=stage.microbatches,
            trains=stage.trains,
            randomness=stage.randomness,
        )
        for position, layer in enumerate(stage.layers)
    ]


def _noise(spec: TensorSpec) -> torch.Tensor:
    value = spec.empty()
    return value.normal_() if spec.dtype.is_floating_point else value.zero_()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Layer costs with their spread and where they were measured.

    layers: in model order. spread: layer -> field -> (lower, upper) quartile of the rounds' means, in seconds.
    """

    layers: list[LayerCost]
    spread: list[dict[str, tuple[float, float]]]
    environment: dict[str, Any]


def summarise(
    rounds_by_rank: Sequence[Sequence[LayerSamples]], names: Sequence[str], environment: dict[str, Any]
) -> Profile:
    """Costs from all ranks' rounds: a round's mean over microbatches, then the median over rounds.

    The mean, since a step takes the sum of its microbatches; the median, since a round may be disturbed from outside.
    """
    by_layer: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in _TIMES}
    sizes: dict[int, dict[str, int]] = {}
    for rounds in rounds_by_rank:
        for samples in rounds:
            sizes.update(samples.sizes)
            for name, layers in samples.seconds.items():
                for layer, seconds in layers.items():
                    by_layer[name][layer].append(fmean(seconds))
    costs, spread = [], []
    for layer in sorted(by_layer["forward_s"]):
        middle = {name: median(layers[layer]) if layers[layer] else 0.0 for name, layers in by_layer.items()}
        costs.append(LayerCost(name=names[layer], **middle, **sizes.get(layer, {})))  # type: ignore[arg-type]
        spread.append({name: _quartiles(layers[layer]) for name, layers in by_layer.items() if layers[layer]})
    return Profile(layers=costs, spread=spread, environment=environment)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(sorted(values), dtype=torch.float64)
    return float(tensor.quantile(0.25)), float(tensor.quantile(0.75))
