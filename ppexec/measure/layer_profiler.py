"""LayerProfiler: the actions of one rank, timed layer by layer and stage by stage under the conditions of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils import _pytree as pytree

from ppexec.machine.device import Device, HostDevice, Mark, Stream
from ppexec.measure.footprint import Footprint, measure_footprint
from ppexec.models.batch import Batch
from ppexec.models.shapes import BoundarySpec, Tree, differentiable, pack, tensors_in
from ppexec.stage.actions import act
from ppexec.stage.ledger import tensors_of
from ppexec.stage.stage import Stage
from ppsim import Kind, Program

TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")
_FIELD = {
    Kind.F: "forward_s",
    Kind.B: "backward_s",
    Kind.I: "backward_input_s",
    Kind.W: "backward_weight_s",
    Kind.R: "recompute_s",
}
_OF_STAGES = tuple(_FIELD.values())


@dataclass(kw_only=True)
class LayerSamples:
    """What one round measured on one rank.

    Attributes
    ----------
    seconds : dict
        Field of LayerCost -> layer -> seconds of each microbatch.
    stage_seconds : dict
        The same by stage, for whole stages.
    sizes : dict
        Layer -> field of LayerCost -> bytes, of the layer as a stage of its own.
    stage_sizes : dict
        The same by stage, for whole stages.
    by_shape : dict
        Kind of input (see `Batch.shapes`) -> `stage_seconds` and `stage_sizes` of its microbatches.
    copy_seconds : dict
        Bytes -> seconds of each copy of so many to host memory or back.
    """

    seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in TIMES})
    stage_seconds: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {name: {} for name in _OF_STAGES})
    sizes: dict[int, dict[str, int | None]] = field(default_factory=dict)
    stage_sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    by_shape: dict[str, tuple[dict[str, dict[int, list[float]]], dict[int, dict[str, int | None]]]] = field(
        default_factory=dict
    )
    copy_seconds: dict[int, list[float]] = field(default_factory=dict)


class LayerProfiler:
    """Times the stages and layers of one rank in the order of a run, without messages.

    The rank runs its actions in the order of the program, so it holds the memory that it holds in a run. It moves
    activations to host memory and back where that stands in the order, between its actions. Inputs and gradients that
    would come from other stages are noise. Bytes are counted once, for each layer and each stage.

    Parameters
    ----------
    program : Program
        The run's program.
    rank : int
        This rank of the program.
    stages : mapping
        Stage number -> stage, for the stages of this rank.
    overwriting : sequence of int
        See `ppexec.models.boundaries.first_overwriting`.
    device : Device, optional
        Where the rank computes; the CPU if not given.
    compute : Stream, optional
        The stream of the rank's computations; one of the device's if not given.
    mark : callable, optional
        Reads a clock in place of the device's. If there are more ranks than cores, this must be one that stops while
        other ranks compute (CPU time).
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage],
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
        self._rows_and_copies = _with_copies(program, rank, self._rows)
        self._split = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.W}
        self._again = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.R}
        self._moved = {(stage, microbatch) for stage, kind, microbatch in self._rows_and_copies if kind == Kind.O}
        self._stages = stages
        self._layers = {
            index: [
                stage.part(at, at + 1, copies_input=overwriting[stage.first_layer + at] == stage.first_layer + at)
                for at in range(len(stage.layers))
            ]
            for index, stage in stages.items()
        }
        self._trains = all(stage.trains for stage in stages.values())
        self._footprints: dict[tuple[str, ...], dict[int, Footprint]] = {}
        self._sizes: dict[int, dict[str, int | None]] = {}

    def round(self, batch: Batch, *, by_layer: bool = True) -> LayerSamples:
        """Run one round of this rank alone; see `work` for what it does."""
        return run_in_turn(self.device, [self], batch, by_layer=by_layer)[0]

    def work(self, batch: Batch, taken: _Taken, *, by_layer: bool) -> Iterator[Callable[[], None]]:
        """Yield the work of a round, to be submitted piece by piece.

        A round runs the rank's order once on whole stages, with R, O and L. If `by_layer`, it then runs the order once
        layer by layer, without these. At last it runs the kind of backward that a stage does not have, whole or split,
        for one microbatch.

        Parameters
        ----------
        batch : Batch
            The microbatches.
        taken : _Taken
            Where the work notes its times.
        by_layer : bool
            Whether to time layers too.
        """
        for stage, kind, microbatch in self._rows_and_copies:
            if kind in (Kind.O, Kind.L):
                yield partial(self._copy, stage, kind, microbatch, taken)
            else:
                yield partial(self._run_stage, stage, kind, microbatch, batch, taken)
        yield self._clear
        if not by_layer:
            return
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.begin(batch)
        for stage, kind, microbatch in (row for row in self._rows if row[1] != Kind.R):
            yield partial(self._run, stage, kind, microbatch, batch, taken, split=(stage, microbatch) in self._split)
        if self._trains:
            for stage in self._layers:
                measured = {kind for of_stage, kind, _ in self._rows if of_stage == stage}
                kinds = (Kind.B,) if Kind.I in measured else (Kind.I, Kind.W)
                other = _Taken() if Kind.B in measured and Kind.I in measured else taken
                yield partial(self._run, stage, Kind.F, 0, batch, _Taken(), split=Kind.W in kinds)
                for kind in kinds:
                    yield partial(self._run, stage, kind, 0, batch, other, split=False)

    def _clear(self) -> None:
        for whole in self._stages.values():
            whole.clear()

    def samples(self, taken: _Taken, batch: Batch) -> LayerSamples:
        """The seconds of a round that the device has done, and the bytes."""
        samples = LayerSamples()
        for found, spans in ((samples.stage_seconds, taken.stages), (samples.seconds, taken.layers)):
            begin_ns, end_ns = (self.device.times_ns([span[at] for span in spans]) for at in (3, 4))
            for (kind, index, _, _, _), begin, end in zip(spans, begin_ns, end_ns, strict=True):
                found[_FIELD[kind]].setdefault(index, []).append((end - begin) / 1e9)
        begin_ns, end_ns = (self.device.times_ns([span[at] for span in taken.copies]) for at in (1, 2))
        for (size_bytes, _, _), begin, end in zip(taken.copies, begin_ns, end_ns, strict=True):
            samples.copy_seconds.setdefault(size_bytes, []).append((end - begin) / 1e9)
        samples.stage_sizes = {index: found.amounts() for index, found in self.footprints(batch).items()}
        if not self._sizes:
            self._sizes = {
                layer.first_layer: self._layer_sizes(layer, batch) for each in self._layers.values() for layer in each
            }
        samples.sizes = self._sizes
        self._note_shapes(samples, taken, batch)
        return samples

    def _note_shapes(self, samples: LayerSamples, taken: _Taken, batch: Batch) -> None:
        """Note the seconds and bytes of whole stages for each kind of microbatch."""
        begin_ns, end_ns = (self.device.times_ns([span[at] for span in taken.stages]) for at in (3, 4))
        for shape in dict.fromkeys(batch.shapes):
            first = batch.shapes.index(shape)
            sizes: dict[int, dict[str, int | None]] = {
                index: {**found.amounts(), **output_sizes(self._boundary_after(self._stages[index], first, batch))}
                for index, found in self.footprints(batch, first).items()
            }
            samples.by_shape[shape] = {name: {} for name in _OF_STAGES}, sizes
        for (kind, index, microbatch, _, _), begin, end in zip(taken.stages, begin_ns, end_ns, strict=True):
            seconds, _ = samples.by_shape[batch.shapes[microbatch]]
            seconds[_FIELD[kind]].setdefault(index, []).append((end - begin) / 1e9)

    def _run_stage(self, index: int, kind: Kind, microbatch: int, batch: Batch, taken: _Taken) -> None:
        """Time one action of a whole stage, in one call as in a run. Separate calls for its layers take longer."""
        stage = self._stages[index]
        stage.begin(batch)
        value = self._given(stage, stage, kind, microbatch, batch)
        begin = self._mark()
        cell = (index, microbatch)
        how = {"split": cell in self._split, "again": cell in self._again, "moves": cell in self._moved}
        act(stage, kind, microbatch, value, batch, **how)
        taken.stages.append((kind, index, microbatch, begin, self._mark()))

    def _copy(self, index: int, kind: Kind, microbatch: int, taken: _Taken) -> None:
        """Time one copy to host memory or back, while nothing is computed."""
        stage, begin = self._stages[index], self._mark()
        if kind == Kind.O:
            size_bytes = stage.offload(microbatch, self.device.host_buffer, self.compute.uses)
        else:
            size_bytes = stage.load(microbatch, self.compute.uses)
        taken.copies.append((size_bytes, begin, self._mark()))

    def _run(self, stage: int, kind: Kind, microbatch: int, batch: Batch, taken: _Taken, *, split: bool) -> None:
        """Time one action of a stage layer by layer."""
        layers = self._layers[stage]
        value = self._given(layers[0], layers[-1], kind, microbatch, batch)
        for layer in layers if kind == Kind.F else reversed(layers):
            begin = self._mark()
            value = act(layer, kind, microbatch, value, batch, split=split)
            taken.layers.append((kind, layer.first_layer, microbatch, begin, self._mark()))

    def _given(self, first: Stage, last: Stage, kind: Kind, microbatch: int, batch: Batch) -> Tree | None:
        """An action's input: for F that of the `first` layer, for B or I the gradient of the `last` layer's output."""
        if kind in (Kind.W, Kind.R):
            return None
        return self._input(first, microbatch, batch) if kind == Kind.F else self._gradient(last, microbatch, batch)

    def footprints(self, batch: Batch, microbatch: int = 0) -> dict[int, Footprint]:
        """Stage number -> footprint of a microbatch, counted once for each kind of microbatch."""
        key = (batch.shapes[microbatch],) if batch.shapes else ()
        if key not in self._footprints:
            self._footprints[key] = {
                index: self._footprint(stage, batch, microbatch, split=any(cell[0] == index for cell in self._split))
                for index, stage in self._stages.items()
            }
        return self._footprints[key]

    def _footprint(self, stage: Stage, batch: Batch, microbatch: int, *, split: bool) -> Footprint:
        stage.begin(batch)
        found: list[Footprint] = []

        def measure() -> None:
            found.append(
                measure_footprint(
                    stage,
                    lambda: pytree.tree_map_only(torch.Tensor, torch.clone, self._input(stage, microbatch, batch)),
                    lambda: self._gradient(stage, microbatch, batch),
                    batch.targets[microbatch] if stage.loss is not None else None,
                    [*tensors_of(stage.layers), *tensors_in(batch.targets)],
                    split=split,
                )
            )

        self.compute.submit(measure, f"measuring what stage {stage.index} holds")
        self.device.synchronize()
        return found[0]

    def _input(self, layer: Stage, microbatch: int, batch: Batch) -> Tree:
        if layer.is_first:
            return batch.inputs[microbatch]
        return self._noise(batch.boundaries[microbatch][layer.first_layer])

    def _gradient(self, layer: Stage, microbatch: int, batch: Batch) -> torch.Tensor | None:
        if layer.loss is not None:
            return None
        return self._noise(self._boundary_after(layer, microbatch, batch), is_gradient=True)

    @staticmethod
    def _boundary_after(layer: Stage, microbatch: int, batch: Batch) -> BoundarySpec:
        return batch.boundaries[microbatch][layer.first_layer + len(layer.layers)]

    def _noise(self, boundary: BoundarySpec, *, is_gradient: bool = False) -> torch.Tensor:
        """A made-up message: of what crosses a boundary, or of its gradient."""
        device = self.device.torch_device
        tensors = tensors_in(boundary.empty(device))
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.normal_()
            else:
                tensor.zero_()
        return pack(differentiable(tensors) if is_gradient else tensors, device)

    def _layer_sizes(self, layer: Stage, batch: Batch) -> dict[str, int | None]:
        found = self._footprint(layer, batch, 0, split=False).amounts()
        return {**found, **output_sizes(self._boundary_after(layer, 0, batch))}


def output_sizes(boundary: BoundarySpec) -> dict[str, int | None]:
    """The bytes of the messages that cross a boundary, by field of StageCost."""
    ahead, back = boundary.message.size_bytes, boundary.gradient.size_bytes
    return {"output_bytes": ahead, "output_gradient_bytes": None if back == ahead else back}


@dataclass(kw_only=True)
class _Taken:
    """The times of a round on the device's clock.

    stages, layers: (kind, stage or layer, microbatch, begin, end) of every action. copies: (bytes, begin, end) of each.
    """

    stages: list[tuple[Kind, int, int, Mark, Mark]] = field(default_factory=list)
    layers: list[tuple[Kind, int, int, Mark, Mark]] = field(default_factory=list)
    copies: list[tuple[int, Mark, Mark]] = field(default_factory=list)


def _with_copies(program: Program, rank: int, rows: Sequence[tuple[int, Kind, int]]) -> list[tuple[int, Kind, int]]:
    """The rows of a rank with its O and L where they stand: stage, kind and microbatch of each."""
    if program.schedule.offload is None:
        return list(rows)
    first = program.rank_actions[rank]
    begins = (program.action_start[first : program.rank_actions[rank + 1] + 1] - program.action_start[first]).tolist()
    found: list[tuple[int, Kind, int]] = []
    done = 0
    for place, copy in program.schedule.offload[rank]:
        found += rows[done : begins[place]]
        found.append((copy.stage, copy.kind, copy.microbatch or 0))
        done = begins[place]
    return [*found, *rows[done:]]


def run_in_turn(
    device: Device, profilers: Sequence[LayerProfiler], batch: Batch, *, by_layer: bool
) -> list[LayerSamples]:
    """Run a round of several ranks at the same time on the device that they share.

    Parameters
    ----------
    device : Device
        Where all of them compute.
    profilers : sequence of LayerProfiler
        One for each rank. Their work is submitted in turn, a piece of each.
    batch : Batch
        The microbatches.
    by_layer : bool
        Whether to time layers too, and not only whole stages.

    Returns
    -------
    list of LayerSamples
        One for each rank.
    """
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
