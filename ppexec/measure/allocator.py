"""Allocator: what a step takes of a GPU's memory, as its caching allocator counts, predicted and measured.

The ledger counts the bytes that actions hold between them. While an action runs it needs more: what its kernels write
before they have done. That is measured for each stage and kind of action alone; the most that a step needs at any time
is then known from its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ppexec.measure.assemble import RankMemory
from ppexec.models.batch import Batch
from ppexec.stage.stage import Stage, act
from ppexec.workers.worker import Worker
from ppsim import Kind, Program


@dataclass(frozen=True, kw_only=True)
class AllocatorPeak:
    """What one process's allocator held at most in a step.

    base_bytes: before it. peak_bytes: at most. transient_bytes: (kind, stage) -> how much more than before it an action
    of this kind needs while it runs, with the gradients there already.
    """

    base_bytes: int
    peak_bytes: int
    transient_bytes: dict[tuple[int, int], int]


def allocator_peak(worker: Worker) -> AllocatorPeak:
    """Run every kind of action alone, then a step. Raises ValueError on a device without such an allocator."""
    device = worker.device.torch_device
    if device.type != "cuda":
        raise ValueError(f"device {worker.config.device!r} has no caching allocator: take a GPU")
    batch = worker.load(0)
    worker.clear()
    worker.step(batch)  # libraries take their workspaces in the first
    worker.clear()
    transients: dict[tuple[int, int], int] = {}
    for rank in worker.ranks:
        for stage in (stage for stage in rank.stages.values() if isinstance(stage, Stage)):
            rank.compute.submit(partial(_note_transients, worker, stage, batch, transients))
    worker.device.synchronize()
    worker.clear()
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    worker.step(batch)
    peak = torch.cuda.max_memory_allocated(device)
    worker.clear()
    return AllocatorPeak(base_bytes=base, peak_bytes=peak, transient_bytes=transients)


def _note_transients(worker: Worker, stage: Stage, batch: Batch, found: dict[tuple[int, int], int]) -> None:
    """Of each kind of action of a stage; the second round counts, since the first makes the gradients."""
    device = worker.device.torch_device
    stage.begin(batch)
    actions = worker.sample_actions(stage, batch)
    is_split = any(kind == Kind.W for kind, _ in actions)
    for kind, value in actions * 2:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = act(stage, kind, 0, value, batch, split=is_split)
        found[int(kind), stage.index] = torch.cuda.max_memory_allocated(device) - before
        del output


def predicted_peak_bytes(program: Program, rank: int, memory: RankMemory, found: AllocatorPeak) -> int:
    """The most that a rank's allocator holds in a step: before each action what is held, and what the action needs.

    memory: what the ledger counted after each row of the rank.
    """
    rows = np.array(list(program.rows_of(rank)))
    held = np.array(memory.activation_bytes) + np.array(memory.buffer_bytes)
    if memory.gradient_bytes is not None:
        held = held + np.array(memory.gradient_bytes)
    before = np.concatenate([[0], held[:-1]])
    needs = [found.transient_bytes[int(program.kind[row]), int(program.stage[row])] for row in rows]
    return int(found.base_bytes + (before + np.array(needs)).max())
