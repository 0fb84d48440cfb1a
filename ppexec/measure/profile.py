"""Profile: what each layer costs, measured under the conditions of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ppexec.machine.device import Device, HostDevice, Mark, Stream
from ppexec.measure.footprint import Footprint, measure_footprint
from ppexec.models.batch import Batch
from ppexec.models.shapes import BoundarySpec, Tree, differentiable, pack, tensors_in
from ppexec.stage.ledger import tensors_of
from ppexec.stage.stage import Stage, act
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
    sizes: dict[int, dict[str, int | None]] = field(default_factory=dict)
    stage_sizes: dict[int, dict[str, int]] = field(default_factory=dict)


class LayerProfiler:
    """Times one rank's layers, each as a stage of its own, in the order and memory of a run but without messages.

    Bytes are counted once, of each layer and of each stage as cut. boundaries: specs before each layer and after the
    last. overwriting: see `shapes.first_overwriting`. Other stages' outputs and gradients are made up of noise.
    device, compute: where the rank computes, the CPU unless given. mark: reads a clock instead of the device's; where
    ranks outnumber the cores it must stand still while others compute (CPU time).
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage],
        boundaries: Sequence[BoundarySpec],
        overwriting: Sequence[int],
        *,
        device: Device | None = None,
        compute: Stream | None = None,
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        self.device: Device = HostDevice() if device is None else device
        self.compute = self.device.compute_stream() if compute is None else compute
        self._mark = self.device.mark if mark is None else mark
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
        self._sizes: dict[int, dict[str, int | None]] = {}

    def round(self, batch: Batch, *, by_layer: bool = True) -> LayerSamples:
        """Run the rank's order once by stage, and if by_layer once by layer, then each layer's other kind of backward
        once."""
        return run_in_turn(self.device, [self], batch, by_layer=by_layer)[0]

    def work(self, batch: Batch, taken: _Taken, *, by_layer: bool) -> Iterator[Callable[[], None]]:
        """A round as pieces of work to be submitted one by one."""
        for stage, kind, microbatch in self._rows:
            yield partial(self._run_stage, stage, kind, microbatch, batch, taken)
        yield self._clear
        if not by_layer:
            return
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.begin(batch)
        for stage, kind, microbatch in self._rows:
            yield partial(self._run, stage, kind, microbatch, batch, taken, split=(stage, microbatch) in self._split)
        if self._trains:
            measured = {kind for _, kind, _ in self._rows}
            for stage in self._layers:
                kinds = (Kind.B,) if Kind.I in measured else (Kind.I, Kind.W)
                other = _Taken() if Kind.B in measured and Kind.I in measured else taken
                yield partial(self._run, stage, Kind.F, 0, batch, _Taken(), split=Kind.W in kinds)
                for kind in kinds:
                    yield partial(self._run, stage, kind, 0, batch, other, split=False)

    def _clear(self) -> None:
        for whole in self._stages.values():
            whole.clear()

    def samples(self, taken: _Taken, batch: Batch) -> LayerSamples:
        """What a round has shown, once the device has done it; with the bytes."""
        samples = LayerSamples()
        for found, spans in ((samples.stage_seconds, taken.stages), (samples.seconds, taken.layers)):
            begin_ns, end_ns = (self.device.times_ns([span[at] for span in spans]) for at in (2, 3))
            for (kind, index, _, _), begin, end in zip(spans, begin_ns, end_ns, strict=True):
                found[_FIELD[kind]].setdefault(index, []).append((end - begin) / 1e9)
        samples.stage_sizes = {index: found.amounts() for index, found in self.footprints(batch).items()}
        if not self._sizes:
            self._sizes = {
                layer.first_layer: self._layer_sizes(layer, batch) for each in self._layers.values() for layer in each
            }
        samples.sizes = self._sizes
        return samples

    def _run_stage(self, index: int, kind: Kind, microbatch: int, batch: Batch, taken: _Taken) -> None:
        """One action of a stage as cut, timed as the runtime's own are: separate calls for its layers cost more."""
        stage = self._stages[index]
        stage.begin(batch)
        value = self._given(stage, stage, kind, microbatch, batch)
        begin = self._mark()
        act(stage, kind, microbatch, value, batch, split=(index, microbatch) in self._split)
        taken.stages.append((kind, index, begin, self._mark()))

    def _run(self, stage: int, kind: Kind, microbatch: int, batch: Batch, taken: _Taken, *, split: bool) -> None:
        layers = self._layers[stage]
        value = self._given(layers[0], layers[-1], kind, microbatch, batch)
        for layer in layers if kind == Kind.F else reversed(layers):
            begin = self._mark()
            value = act(layer, kind, microbatch, value, batch, split=split)
            taken.layers.append((kind, layer.first_layer, begin, self._mark()))

    def _given(self, first: Stage, last: Stage, kind: Kind, microbatch: int, batch: Batch) -> Tree | None:
        """What an action of these layers needs: the first one's input, the gradient of the last one's output."""
        if kind == Kind.W:
            return None
        return self._input(first, microbatch, batch) if kind == Kind.F else self._gradient(last)

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
        found: list[Footprint] = []

        def measure() -> None:
            found.append(
                measure_footprint(
                    stage,
                    lambda: pytree.tree_map_only(torch.Tensor, torch.clone, self._input(stage, 0, batch)),
                    lambda: self._gradient(stage),
                    batch.targets[0] if stage.loss is not None else None,
                    [*tensors_of(stage.layers), *tensors_in(batch.targets)],
                    split=split,
                )
            )

        self.compute.submit(measure, f"measuring what stage {stage.index} holds")
        self.device.synchronize()
        return found[0]

    def _input(self, layer: Stage, microbatch: int, batch: Batch) -> Tree:
        return batch.inputs[microbatch] if layer.is_first else self._noise(layer.first_layer)

    def _gradient(self, layer: Stage) -> torch.Tensor | None:
        return None if layer.loss is not None else self._noise(layer.first_layer + len(layer.layers), is_gradient=True)

    def _noise(self, boundary: int, *, is_gradient: bool = False) -> torch.Tensor:
        """A made-up message: of what crosses a boundary, or of its gradient."""
        device = self.device.torch_device
        tensors = tensors_in(self._boundaries[boundary].empty(device))
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.normal_()
            else:
                tensor.zero_()
        return pack(differentiable(tensors) if is_gradient else tensors, device)

    def _layer_sizes(self, layer: Stage, batch: Batch) -> dict[str, int | None]:
        found = self._footprint(layer, batch, split=False).amounts()
        return {**found, **output_sizes(self._boundaries[layer.first_layer + 1])}


def output_sizes(boundary: BoundarySpec) -> dict[str, int | None]:
    """The bytes of the messages that cross a boundary, by field of StageCost."""
    ahead, back = boundary.message.size_bytes, boundary.gradient.size_bytes
    return {"output_bytes": ahead, "output_gradient_bytes": None if back == ahead else back}


@dataclass(kw_only=True)
class _Taken:
    """What a round took: (kind, stage or layer, begin, end) of every action; moments on the device's clock."""

    stages: list[tuple[Kind, int, Mark, Mark]] = field(default_factory=list)
    layers: list[tuple[Kind, int, Mark, Mark]] = field(default_factory=list)


def run_in_turn(
    device: Device, profilers: Sequence[LayerProfiler], batch: Batch, *, by_layer: bool
) -> list[LayerSamples]:
    """A round of several ranks that share a device, side by side: their actions are submitted in turn."""
    device.begin()
    every = [_Taken() for _ in profilers]
    pending = [
        (profiler, profiler.work(batch, taken, by_layer=by_layer))
        for profiler, taken in zip(profilers, every, strict=True)
    ]
    while pending:
        for profiler, rest in list(pending):
            work = next(rest, None)
            if work is None:
                pending.remove((profiler, rest))
            else:
                profiler.compute.submit(work, "a profiled action")
    device.synchronize()
    return [profiler.samples(taken, batch) for profiler, taken in zip(profilers, every, strict=True)]


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
    sizes: dict[int, dict[str, int | None]] = {}
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
