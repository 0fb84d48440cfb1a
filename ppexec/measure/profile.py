"""Profile: what each layer costs, measured under the conditions of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch

from ppexec.machine.clock import now_ns
from ppexec.measure.footprint import Footprint, measure_footprint
from ppexec.models.batch import Batch
from ppexec.models.shapes import TensorSpec
from ppexec.stage.ledger import tensors_of
from ppexec.stage.stage import Stage
from ppsim import Kind, LayerCost, Program, StageCost, partition

_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")
_FIELD = {Kind.F: "forward_s", Kind.B: "backward_s", Kind.I: "backward_input_s", Kind.W: "backward_weight_s"}


@dataclass(kw_only=True)
class LayerSamples:
    """One round on one rank.

    seconds: field of LayerCost -> layer -> seconds of each microbatch. sizes: layer -> field -> bytes, of the layer as
    a stage of its own. stage_seconds, stage_sizes: the same by stage, of the stage as cut.
    """

    seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in _TIMES})
    stage_seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in _TIMES})
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    stage_sizes: dict[int, dict[str, int]] = field(default_factory=dict)

    def add(self, kind: Kind, layer: int, elapsed_ns: int) -> None:
        """Note how long an action of this kind took on a layer."""
        self.seconds[_FIELD[kind]].setdefault(layer, []).append(elapsed_ns / 1e9)


class LayerProfiler:
    """Times one rank's layers, each as a stage of its own, in the order and memory of a run but without messages.

    Bytes are counted once, of each layer and of each stage as cut. boundaries: specs before each layer and after the
    last. overwriting: see `shapes.first_overwriting`. Other stages' outputs and gradients are made up of noise.
    clock: nanoseconds; where ranks outnumber the cores it must stand still while others compute (CPU time).
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage],
        boundaries: Sequence[TensorSpec],
        overwriting: Sequence[int],
        *,
        clock: Callable[[], int] = now_ns,
    ) -> None:
        self._clock = clock
        self._rows = [
            (int(program.stage[row]), Kind(int(program.kind[row])), int(program.microbatch[row]))
            for row in program.rows_of(rank)
        ]
        self._split = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.W}
        self._boundaries = boundaries
        self._stages = stages
        self._layers = {
            index: [
                stage.part(at, at + 1, copies_input=overwriting[stage.first_layer + at] == stage.first_layer + at)
                for at in range(len(stage.layers))
            ]
            for index, stage in stages.items()
        }
        self._trains = all(stage.trains for stage in stages.values())
        self._footprints: dict[int, Footprint] = {}
        self._sizes: dict[int, dict[str, int]] = {}

    def round(self, batch: Batch, *, by_layer: bool = True) -> LayerSamples:
        """Run the rank's order once by stage, and if by_layer once by layer, then each layer's other kind of backward
        once."""
        samples = LayerSamples()
        for stage, kind, microbatch in self._rows:
            self._run_stage(stage, kind, microbatch, batch, samples, split=(stage, microbatch) in self._split)
        for whole in self._stages.values():
            whole.clear()
        if by_layer:
            self._run_layers(batch, samples)
        samples.stage_sizes = {index: found.amounts() for index, found in self.footprints(batch).items()}
        if not self._sizes:
            self._sizes = {
                layer.first_layer: self._layer_sizes(layer, batch) for each in self._layers.values() for layer in each
            }
        samples.sizes = self._sizes
        return samples

    def _run_layers(self, batch: Batch, samples: LayerSamples) -> None:
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.begin(batch)
        for stage, kind, microbatch in self._rows:
            self._run(stage, kind, microbatch, batch, samples, split=(stage, microbatch) in self._split)
        if self._trains:
            measured = {kind for _, kind, _ in self._rows}
            for stage in self._layers:
                kinds = (Kind.B,) if Kind.I in measured else (Kind.I, Kind.W)
                only_backward = LayerSamples()
                self._run(stage, Kind.F, 0, batch, LayerSamples(), split=Kind.W in kinds)
                for kind in kinds:
                    self._run(stage, kind, 0, batch, only_backward, split=False)
                if not (Kind.B in measured and Kind.I in measured):
                    for name, found in only_backward.seconds.items():
                        samples.seconds[name].update(found)

    def _run_stage(
        self, index: int, kind: Kind, microbatch: int, batch: Batch, samples: LayerSamples, *, split: bool
    ) -> None:
        """One action of a stage as cut, timed as the runtime's own are: separate calls for its layers cost more."""
        stage = self._stages[index]
        stage.begin(batch)
        value: torch.Tensor | None = None
        if kind == Kind.F:
            value = self._input(stage, microbatch, batch)
        elif kind != Kind.W:
            value = self._gradient(stage)
        target = batch.targets[microbatch] if stage.loss is not None else None
        began = self._clock()
        if kind == Kind.F:
            stage.forward(microbatch, value, target, split=split)
        elif kind == Kind.B:
            stage.backward(microbatch, value)
        elif kind == Kind.I:
            stage.backward_input(microbatch, value)
        else:
            stage.backward_weight(microbatch)
        samples.stage_seconds[_FIELD[kind]].setdefault(index, []).append((self._clock() - began) / 1e9)

    def footprints(self, batch: Batch) -> dict[int, Footprint]:
        """What each of this rank's stages holds, counted when first asked for."""
        if not self._footprints:
            self._footprints = {
                index: self._footprint(stage, batch, split=any(cell[0] == index for cell in self._split))
                for index, stage in self._stages.items()
            }
        return self._footprints

    def _footprint(self, stage: Stage, batch: Batch, *, split: bool) -> Footprint:
        stage.begin(batch)
        return measure_footprint(
            stage,
            lambda: self._input(stage, 0, batch).clone(),
            lambda: self._gradient(stage),
            batch.targets[0] if stage.loss is not None else None,
            [*tensors_of(stage.layers), *batch.targets],
            split=split,
        )

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
            began = self._clock()
            if kind == Kind.F:
                value = layer.forward(microbatch, value, target, split=split)
            elif kind == Kind.B:
                value = layer.backward(microbatch, value)
            elif kind == Kind.I:
                value = layer.backward_input(microbatch, value)
            else:
                layer.backward_weight(microbatch)
            samples.add(kind, layer.first_layer, self._clock() - began)

    def _input(self, layer: Stage, microbatch: int, batch: Batch) -> torch.Tensor:
        return batch.inputs[microbatch] if layer.is_first else _noise(self._boundaries[layer.first_layer])

    def _gradient(self, layer: Stage) -> torch.Tensor | None:
        return None if layer.loss is not None else _noise(self._boundaries[layer.first_layer + len(layer.layers)])

    def _layer_sizes(self, layer: Stage, batch: Batch) -> dict[str, int]:
        found = self._footprint(layer, batch, split=False).amounts()
        return {**found, "output_bytes": self._boundaries[layer.first_layer + 1].size_bytes}


def _noise(spec: TensorSpec) -> torch.Tensor:
    value = spec.empty()
    return value.normal_() if spec.dtype.is_floating_point else value.zero_()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Layer costs with their spread and where they were measured.

    layers: in model order. stages: of the run's own cut, measured on each stage as cut, to which layers' bytes, and
    seconds in separate calls, do not simply add up; only the kind of backward that the run does not have is a sum.
    spread: layer -> field -> (lower, upper) quartile of the rounds' means, in seconds.
    """

    layers: list[LayerCost]
    stages: list[StageCost]
    spread: list[dict[str, tuple[float, float]]]
    environment: dict[str, Any]


def summarise(
    rounds_by_rank: Sequence[Sequence[LayerSamples]],
    names: Sequence[str],
    environment: dict[str, Any],
    layer_sizes: Sequence[int],
) -> Profile:
    """Costs from all ranks' rounds: a round's mean over microbatches, then the median over rounds.

    The mean, since a step takes the sum of its microbatches; the median, since a round may be disturbed from outside.
    layer_sizes: the number of layers of each stage.
    """
    by_layer: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in _TIMES}
    sizes: dict[int, dict[str, int]] = {}
    stage_sizes: dict[int, dict[str, int]] = {}
    by_stage: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rounds in rounds_by_rank:
        for samples in rounds:
            for name, measured in samples.stage_seconds.items():
                for stage, seconds in measured.items():
                    by_stage[stage][name].append(fmean(seconds))
            sizes.update(samples.sizes)
            stage_sizes.update(samples.stage_sizes)
            for name, layers in samples.seconds.items():
                for layer, seconds in layers.items():
                    by_layer[name][layer].append(fmean(seconds))
    costs, spread = [], []
    for layer in sorted(by_layer["forward_s"]):
        middle = {name: median(layers[layer]) if layers[layer] else 0.0 for name, layers in by_layer.items()}
        costs.append(LayerCost(name=names[layer], **middle, **sizes.get(layer, {})))  # type: ignore[arg-type]
        spread.append({name: _quartiles(layers[layer]) for name, layers in by_layer.items() if layers[layer]})
    summed = partition(costs, stages=len(layer_sizes), method=list(layer_sizes))
    stages = [
        replace(
            stage,
            **stage_sizes.get(index, {}),
            **{name: median(seconds) for name, seconds in by_stage[index].items()},  # type: ignore[arg-type]
        )
        for index, stage in enumerate(summed)
    ]
    return Profile(layers=costs, stages=stages, spread=spread, environment=environment)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(sorted(values), dtype=torch.float64)
    return float(tensor.quantile(0.25)), float(tensor.quantile(0.75))
