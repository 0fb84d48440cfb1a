"""LayerProfiler: the actions of one rank, timed layer by layer and stage by stage under the conditions of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.utils import _pytree as pytree

from ppexec.machine.device import Device, HostDevice, Mark, Stream
from ppexec.measure.footprint import Footprint, measure_footprint
from ppexec.measure.layer_samples import FIELD_OF_KIND, STAGE_TIMES, CopySpan, LayerSamples, RoundTimes, Span
from ppexec.models.batch import Batch
from ppexec.models.shapes import BoundarySpec, Tree, differentiable, pack, tensors_in
from ppexec.stage.actions import act
from ppexec.stage.ledger import tensors_of
from ppexec.stage.stage import Stage
from ppsim import Kind, Program


class LayerProfiler:
    """Times the stages and layers of one rank in the order of a run, without messages.

    The rank runs its actions in the order of the program, so it holds the memory that it holds in a run. It moves
    activations to host memory and back where that stands in the order, between its actions. Inputs and gradients that
    would come from other stages are random numbers (zeros if they are integers). Bytes are counted once for each layer,
    and once for each stage and input shape.

    Parameters
    ----------
    program : Program
        The run's program.
    rank : int
        This rank of the program.
    stages : mapping
        Stage number -> stage, for the stages of this rank.
    overwriting : sequence of int
        For each layer of the model the first layer, itself or a later one, that works in place on this layer's input;
        the number of layers if none does. See `ppexec.models.boundaries.first_overwriting`.
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
        # The (stage, microbatch) with a split backward, with recomputation, and with offloaded activations.
        self._split = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.W}
        self._again = {(stage, microbatch) for stage, kind, microbatch in self._rows if kind == Kind.R}
        self._moved = {(stage, microbatch) for stage, kind, microbatch in self._rows_and_copies if kind == Kind.O}
        self._stages = stages
        # Profiled alone, a layer copies its input only if this very layer writes on it, whatever later ones do.
        self._layers = {
            index: [
                stage.part(at, at + 1, copies_input=overwriting[stage.first_layer + at] == stage.first_layer + at)
                for at in range(len(stage.layers))
            ]
            for index, stage in stages.items()
        }
        self._trains = all(stage.trains for stage in stages.values())
        self._footprints: dict[str, dict[int, Footprint]] = {}
        self._sizes: dict[int, dict[str, int | None]] = {}

    def round(self, batch: Batch, *, by_layer: bool = True) -> LayerSamples:
        """Run one round of this rank alone. See `work` for what a round does."""
        return run_in_turn(self.device, [self], batch, by_layer=by_layer)[0]

    def work(self, batch: Batch, times: RoundTimes, *, by_layer: bool) -> Iterator[Callable[[], None]]:
        """Yield the work of a round, to be submitted piece by piece.

        A round runs the rank's order once on whole stages, with recomputation (R) and copies to host memory and back (O
        and L). If `by_layer`, it then runs the order once layer by layer, without R, O and L. At last, if the run
        trains, it times, also layer by layer and for microbatch 0, the backward that the order does not have: B of
        stages that have I and W, and I and W of stages that have B.

        Parameters
        ----------
        batch : Batch
            The microbatches.
        times : RoundTimes
            Where the work notes its times.
        by_layer : bool
            Whether to time layers too.
        """
        for stage, kind, microbatch in self._rows_and_copies:
            if kind in (Kind.O, Kind.L):
                yield partial(self._copy, stage, kind, microbatch, times)
            else:
                yield partial(self._run_stage, stage, kind, microbatch, batch, times)
        yield self._clear
        if not by_layer:
            return
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.begin(batch)
        for stage, kind, microbatch in (row for row in self._rows if row[1] != Kind.R):
            yield partial(self._run, stage, kind, microbatch, batch, times, split=(stage, microbatch) in self._split)
        if self._trains:
            for stage in self._layers:
                timed = {kind for of_stage, kind, _ in self._rows if of_stage == stage}
                if {Kind.B, Kind.I} <= timed:
                    continue
                kinds = (Kind.B,) if Kind.I in timed else (Kind.I, Kind.W)
                # They need a forward first, whose time is not noted.
                yield partial(self._run, stage, Kind.F, 0, batch, RoundTimes(), split=Kind.W in kinds)
                for kind in kinds:
                    yield partial(self._run, stage, kind, 0, batch, times, split=False)

    def _clear(self) -> None:
        for whole in self._stages.values():
            whole.clear()

    def samples(self, times: RoundTimes, batch: Batch) -> LayerSamples:
        """The seconds of a round that the device has done, and the bytes."""
        samples = LayerSamples()
        for found, spans in ((samples.stage_seconds, times.stages), (samples.seconds, times.layers)):
            for span, seconds in zip(spans, self._seconds(spans), strict=True):
                found[FIELD_OF_KIND[span.kind]].setdefault(span.number, []).append(seconds)
        for copy, seconds in zip(times.copies, self._seconds(times.copies), strict=True):
            samples.copy_seconds.setdefault(copy.size_bytes, []).append(seconds)
        samples.stage_sizes = {index: found.amounts() for index, found in self.footprints(batch).items()}
        if not self._sizes:
            self._sizes = {
                layer.first_layer: self._layer_sizes(layer, batch) for each in self._layers.values() for layer in each
            }
        samples.sizes = self._sizes
        self._note_shapes(samples, times.stages, batch)
        return samples

    def _seconds(self, spans: Sequence[Span | CopySpan]) -> list[float]:
        """How long each took."""
        begin_ns, end_ns = (self.device.times_ns([getattr(span, end) for span in spans]) for end in ("begin", "end"))
        return [(end - begin) / 1e9 for begin, end in zip(begin_ns, end_ns, strict=True)]

    def _note_shapes(self, samples: LayerSamples, spans: Sequence[Span], batch: Batch) -> None:
        """Note the seconds and bytes of whole stages for each input shape."""
        for shape in dict.fromkeys(batch.shapes):
            first = batch.shapes.index(shape)
            sizes: dict[int, dict[str, int | None]] = {
                index: {**found.amounts(), **output_sizes(self._boundary_after(self._stages[index], first, batch))}
                for index, found in self.footprints(batch, first).items()
            }
            samples.by_shape[shape] = {name: {} for name in STAGE_TIMES}, sizes
        for span, seconds in zip(spans, self._seconds(spans), strict=True):
            of_shape, _ = samples.by_shape[batch.shapes[span.microbatch]]
            of_shape[FIELD_OF_KIND[span.kind]].setdefault(span.number, []).append(seconds)

    def _run_stage(self, index: int, kind: Kind, microbatch: int, batch: Batch, times: RoundTimes) -> None:
        """Time one action of a whole stage, in one call as in a run. Separate calls for its layers take longer."""
        stage = self._stages[index]
        stage.begin(batch)
        value = self._given(stage, stage, kind, microbatch, batch)
        begin = self._mark()
        cell = (index, microbatch)
        how = {"split": cell in self._split, "again": cell in self._again, "moves": cell in self._moved}
        act(stage, kind, microbatch, value, batch, **how)
        times.stages.append(Span(kind, index, microbatch, begin, self._mark()))

    def _copy(self, index: int, kind: Kind, microbatch: int, times: RoundTimes) -> None:
        """Time one copy to host memory or back, while this rank computes nothing."""
        stage, begin = self._stages[index], self._mark()
        if kind == Kind.O:
            size_bytes = stage.offload(microbatch, self.device.host_buffer, self.compute.uses)
        else:
            size_bytes = stage.load(microbatch, self.compute.uses)
        times.copies.append(CopySpan(size_bytes, begin, self._mark()))

    def _run(self, stage: int, kind: Kind, microbatch: int, batch: Batch, times: RoundTimes, *, split: bool) -> None:
        """Time one action of a stage layer by layer."""
        layers = self._layers[stage]
        value = self._given(layers[0], layers[-1], kind, microbatch, batch)
        for layer in layers if kind == Kind.F else reversed(layers):
            begin = self._mark()
            value = act(layer, kind, microbatch, value, batch, split=split)
            times.layers.append(Span(kind, layer.first_layer, microbatch, begin, self._mark()))

    def _given(self, first: Stage, last: Stage, kind: Kind, microbatch: int, batch: Batch) -> Tree | None:
        """What an action takes: F the first layer's input, B and I the last layer's output gradient, others nothing."""
        if kind in (Kind.W, Kind.R):
            return None
        return self._input(first, microbatch, batch) if kind == Kind.F else self._gradient(last, microbatch, batch)

    def footprints(self, batch: Batch, microbatch: int = 0) -> dict[int, Footprint]:
        """Stage number -> footprint of a microbatch, counted once for each input shape."""
        key = batch.shapes[microbatch]
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


def _with_copies(program: Program, rank: int, rows: Sequence[tuple[int, Kind, int]]) -> list[tuple[int, Kind, int]]:
    """The rows of a rank with its O and L among them: stage, kind and microbatch of each."""
    if program.schedule.offload is None:
        return list(rows)
    first = program.rank_actions[rank]
    # The first row of each action: an overlapped pair has two. A copy stands before an action.
    begins = (program.action_start[first : program.rank_actions[rank + 1] + 1] - program.action_start[first]).tolist()
    found: list[tuple[int, Kind, int]] = []
    done = 0
    for action, copy in program.schedule.offload[rank]:
        found += rows[done : begins[action]]
        found.append((copy.stage, copy.kind, copy.microbatch or 0))  # an O or L always has a microbatch
        done = begins[action]
    return [*found, *rows[done:]]


def run_in_turn(
    device: Device, profilers: Sequence[LayerProfiler], batch: Batch, *, by_layer: bool
) -> list[LayerSamples]:
    """Run a round of several ranks together on the device that they share. Their work may overlap there.

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
    every = [RoundTimes() for _ in profilers]
    pending = [
        (profiler, profiler.work(batch, times, by_layer=by_layer))
        for profiler, times in zip(profilers, every, strict=True)
    ]
    while pending:
        for profiler, rest in list(pending):
            work = next(rest, None)
            if work is None:
                pending.remove((profiler, rest))
            else:
                profiler.compute.submit(work, "a profiled action")
    device.synchronize()
    return [profiler.samples(times, batch) for profiler, times in zip(profilers, every, strict=True)]
