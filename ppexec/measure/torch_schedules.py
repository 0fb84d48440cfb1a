"""PyTorch's schedules: PyTorch's pipeline runtime, and a plain loop, on a worker's stages, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from ppexec.machine.clock import now_ns
from ppexec.models.batch import Batch
from ppexec.stage.stage import Stage
from ppexec.workers.worker import Worker
from ppsim import Kind
from ppsim.errors import InputError

PEERS = ("torch-gpipe", "torch-1f1b", "torch-runtime")
"""PyTorch's executors. "torch-runtime" interprets this run's own schedule, and the others run their own."""


def peer_step(worker: Worker, name: str) -> Callable[[Batch], Any]:
    """Make a function that runs one step of one of `PEERS` on this rank's one stage.

    Raises InputError for other names, and for stages with keyed dropout or recomputation.
    """
    if name not in PEERS:
        raise InputError(f"unknown executor {name!r}: known are {', '.join(PEERS)}")
    if worker.program.is_recomputed.any() or worker.program.schedule.offload is not None:
        raise InputError("PyTorch's schedules know no R, O and L: leave them out to compare")
    (stage,) = (stage for stage in worker.stages.values() if isinstance(stage, Stage))
    module = _plain(worker, stage)
    count, last = worker.pipeline.stages, stage.loss is not None
    pipeline_stage = PipelineStage(module, stage.index, count, worker.device.torch_device, group=worker.pipeline_group)
    loss = worker.model.loss
    schedule: Any
    if name == "torch-runtime":
        schedule = _PipelineScheduleRuntime([pipeline_stage], worker.pipeline.microbatches, loss_fn=loss)
        schedule.pipeline_order = {}
        _load_order(schedule, worker.pipeline.to_csv())
    else:
        kind = ScheduleGPipe if name == "torch-gpipe" else Schedule1F1B
        schedule = kind(pipeline_stage, worker.pipeline.microbatches, loss_fn=loss)

    def step(batch: Batch) -> Any:
        inputs = (torch.cat(batch.inputs),) if stage.is_first else ()
        target = torch.cat(batch.targets) if last else None
        return schedule.step(*inputs, target=target)

    return step


def _plain(worker: Worker, stage: Stage) -> nn.Module:
    """The stage's layers for PyTorch, whose schedules do not tell layers the microbatch that keyed dropout needs."""
    if not all(boundary.tree.is_leaf() for boundary in worker.boundaries):
        raise InputError("PyTorch's schedules are compared on layers that give one tensor: this model's give several")
    if stage.randomness is not None or type(stage) is not Stage:
        raise InputError("PyTorch's schedules have no keyed dropout or recomputation: switch both off to compare")
    return nn.Sequential(*stage.layers)


def _load_order(schedule: Any, text: str) -> None:
    """Give the schedule a CSV text. PyTorch reads schedules from files only."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "schedule.csv"
        path.write_text(text)
        schedule._load_csv(str(path), format="compute_only")


def time_peer(worker: Worker, name: str, steps: int) -> list[tuple[int, int]]:
    """Time steps of PyTorch's runtime.

    Parameters
    ----------
    worker : Worker
        This process.
    name : str
        One of `PEERS`.
    steps : int
        How many.

    Returns
    -------
    list of (int, int)
        Begin and end of each step, in nanoseconds on the first rank's clock.
    """
    step = worker.keep(name, lambda: peer_step(worker, name))
    times = []
    compute = worker.ranks[0].compute  # on another stream each gradient would cost an event
    for batch in worker.undisturbed_batches(0, steps):
        began = now_ns()
        compute.submit(partial(step, batch))
        worker.device.synchronize()
        times.append((began + worker.offset_ns, now_ns() + worker.offset_ns))
    return times


def time_compute(worker: Worker, rounds: int) -> list[dict[str, float]]:
    """Time a plain loop over F and B of this rank's one stage, without messages.

    Parameters
    ----------
    worker : Worker
        This process.
    rounds : int
        How many times to run the loop.

    Returns
    -------
    list of dict
        For each round the mean `forward_s` and `backward_s` of a microbatch, and `whole_s` of the loop. On a GPU the
        former are the times to launch the work, and the loop ends when the GPU is done.
    """
    (stage,) = (stage for stage in worker.stages.values() if isinstance(stage, Stage))
    module = _plain(worker, stage)
    program, first, device = worker.program, stage.first_layer, worker.device.torch_device
    every = [(Kind(int(program.kind[row])), int(program.microbatch[row])) for row in program.rows_of(worker.rank)]
    rows = [(kind, microbatch) for kind, microbatch in every if kind != Kind.R]  # a plain loop keeps activations
    received = worker.boundaries[first].message.empty(device).normal_()
    gradient = worker.boundaries[first + len(stage.layers)].gradient.empty(device).normal_()
    found: list[dict[str, float]] = []
    for batch in worker.undisturbed_batches(0, rounds):
        spent: dict[str, float] = {}
        began = now_ns()
        worker.ranks[0].compute.submit(partial(_run_plain, stage, module, rows, batch, received, gradient, spent))
        worker.device.synchronize()
        found.append({**spent, "whole_s": (now_ns() - began) / 1e9})
    return found


def _run_plain(
    stage: Stage,
    module: nn.Module,
    rows: Sequence[tuple[Kind, int]],
    batch: Batch,
    received: torch.Tensor,
    gradient: torch.Tensor,
    spent: dict[str, float],
) -> None:
    """Run forwards and backwards in the order of `rows`, as one writes them without a pipeline."""
    roots: dict[int, torch.Tensor] = {}
    spent_ns = {Kind.F: 0, Kind.B: 0}
    for kind, microbatch in rows:
        value = batch.inputs[microbatch] if stage.is_first else received.detach().requires_grad_()
        began = now_ns()
        if kind == Kind.F:
            root = module(value)
            if stage.loss is not None:
                root = stage.loss(root, batch.targets[microbatch]) / stage.microbatches
            roots[microbatch] = root
        else:
            torch.autograd.backward(roots.pop(microbatch), None if stage.loss is not None else gradient)
        spent_ns[kind] += now_ns() - began
    count = len(rows) / 2
    spent.update(forward_s=spent_ns[Kind.F] / count / 1e9, backward_s=spent_ns[Kind.B] / count / 1e9)
