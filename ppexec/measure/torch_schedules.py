"""Peer: PyTorch's own pipeline schedules on a worker's stages, and its computations alone, to be measured against."""

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

PEERS = ("torch-gpipe", "torch-1f1b", "torch-runtime")


def peer_step(worker: Worker, name: str) -> Callable[[Batch], Any]:
    """A function that runs one step of PyTorch's schedule on this rank's one stage.

    name: "torch-gpipe", "torch-1f1b", or "torch-runtime", which interprets this run's own schedule file.
    """
    if name not in PEERS:
        raise ValueError(f"unknown executor {name!r}: known are {', '.join(PEERS)}")
    (stage,) = (stage for stage in worker.stages.values() if isinstance(stage, Stage))
    module = _plain(worker, stage)
    count, last = worker.config.pipeline.stages, stage.loss is not None
    pipeline_stage = PipelineStage(module, stage.index, count, worker.device.torch_device, group=worker.pipeline_group)
    loss = worker.model.loss
    schedule: Any
    if name == "torch-runtime":
        schedule = _PipelineScheduleRuntime([pipeline_stage], worker.config.microbatches, loss_fn=loss)
        schedule.pipeline_order = {}
        _load_order(schedule, worker.config.pipeline.to_csv())
    else:
        kind = ScheduleGPipe if name == "torch-gpipe" else Schedule1F1B
        schedule = kind(pipeline_stage, worker.config.microbatches, loss_fn=loss)

    def step(batch: Batch) -> Any:
        inputs = (torch.cat(batch.inputs),) if stage.is_first else ()
        target = torch.cat(batch.targets) if last else None
        return schedule.step(*inputs, target=target)

    return step


def _plain(worker: Worker, stage: Stage) -> nn.Module:
    """The stage's layers as PyTorch runs them, which tells nobody which microbatch it computes."""
    if not all(boundary.tree.is_leaf() for boundary in worker.boundaries):
        raise ValueError(
            "PyTorch's schedules are compared on layers that hand on one tensor: this model's hand on more"
        )
    if stage.randomness is not None or type(stage) is not Stage:
        raise ValueError("PyTorch's schedules know no keyed dropout or recomputation: compare with both switched off")
    return nn.Sequential(*stage.layers)


def _load_order(schedule: Any, text: str) -> None:
    """PyTorch reads schedules from files alone."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "schedule.csv"
        path.write_text(text)
        schedule._load_csv(str(path), format="compute_only")


def time_peer(worker: Worker, name: str, steps: int) -> list[tuple[int, int]]:
    """When this rank began and ended each step, in nanoseconds on the first rank's clock."""
    step = worker.keep(name, lambda: peer_step(worker, name))
    times = []
    compute = worker.ranks[0].compute  # gradients that another stream made would cost an event each
    for batch in worker.undisturbed_batches(0, steps):
        began = now_ns()
        compute.submit(partial(step, batch))
        worker.device.synchronize()
        times.append((began + worker.offset_ns, now_ns() + worker.offset_ns))
    return times


def time_compute(worker: Worker, rounds: int) -> list[dict[str, float]]:
    """Seconds of F and B of this rank's one stage, mean over a round's microbatches, and of the whole plain loop.

    On a GPU F and B are what launching takes; the whole loop ends when the GPU is done.
    """
    (stage,) = (stage for stage in worker.stages.values() if isinstance(stage, Stage))
    module = _plain(worker, stage)
    rows = [(Kind(int(worker.program.kind[row])), int(worker.program.microbatch[row]))
            for row in worker.program.rows_of(worker.rank)]  # fmt: skip
    received = worker.boundaries[stage.first_layer].message.empty(worker.device.torch_device).normal_()
    gradient = (
        worker.boundaries[stage.first_layer + len(stage.layers)].gradient.empty(worker.device.torch_device).normal_()
    )
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
    """Forwards and backwards in the order of `rows`, as one writes them without a pipeline."""
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
