"""Allocator: what a step takes of a GPU's memory, as its caching allocator counts, predicted and measured.

The ledger counts the bytes that actions hold between them. While an action runs it needs more: what its kernels write
before they have done. That is measured for each stage and kind of action alone; the most that a step needs at any time
is then known from its order.

A stage's first backward makes the gradients, later ones add to them. The first needs room for the gradients but for no
sum beside them, so it is measured apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ppexec.measure.assemble import RankMemory
from ppexec.models.batch import Batch
from ppexec.stage.actions import act
from ppexec.stage.stage import Stage
from ppexec.workers.worker import Worker
from ppsim import Kind, Program
from ppsim.errors import InputError

_MAKES_GRADIENTS = (Kind.B, Kind.W)


class AllocatorBytes(Protocol):
    """What an allocator says about itself."""

    def held(self) -> int:
        """Bytes that tensors take now."""

    def start_peak(self) -> None:
        """Let `peak` be of what comes from now on."""

    def peak(self) -> int:
        """The most bytes that tensors took since `start_peak`."""


class _CudaBytes:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


Action = tuple[int, int]
"""Kind and stage."""


@dataclass(frozen=True, kw_only=True)
class AllocatorPeak:
    """What one process's allocator held at most in a step.

    Parameters
    ----------
    base_bytes : int
        Before the step.
    peak_bytes : int
        At most in it.
    transient_bytes : dict of (kind, stage) to int
        How much more than before it an action of this kind needs while it runs, with the gradients there already.
    first_transient_bytes : dict of (kind, stage) to int
        The same of a B or W that makes the stage's gradients.
    data_bytes : int
        Of a microbatch's input to stage 0, which is there before the step; 0 where others hold stage 0.
    message_bytes : int
        Of the largest message.
    """

    base_bytes: int
    peak_bytes: int
    transient_bytes: dict[Action, int]
    first_transient_bytes: dict[Action, int]
    data_bytes: int = 0
    message_bytes: int = 0


def allocator_peak(worker: Worker, allocator: AllocatorBytes | None = None) -> AllocatorPeak:
    """Run every kind of action alone, then a step.

    Parameters
    ----------
    worker : Worker
        Holds the stages.
    allocator : AllocatorBytes, optional
        Counts; the GPU's caching allocator unless given.

    Raises
    ------
    InputError
        On a device without a caching allocator, if none is given.
    """
    device = worker.device.torch_device
    if allocator is None:
        if device.type != "cuda":
            raise InputError(f"device {worker.config.device!r} has no caching allocator: take a GPU")
        allocator = _CudaBytes(device)
    batch = worker.load(0)
    worker.clear()
    worker.step(batch)  # libraries take their workspaces in the first
    worker.clear()
    first: dict[Action, int] = {}
    later: dict[Action, int] = {}
    for rank in worker.ranks:
        for stage in (stage for stage in rank.stages.values() if isinstance(stage, Stage)):
            rank.compute.submit(partial(_note_transients, worker, stage, batch, allocator, first, later))
    worker.device.synchronize()
    worker.clear()
    base = allocator.held()
    allocator.start_peak()
    worker.step(batch)
    peak = allocator.peak()
    worker.clear()
    return AllocatorPeak(
        base_bytes=base,
        peak_bytes=peak,
        transient_bytes=later,
        first_transient_bytes=first,
        data_bytes=batch.inputs[0].nbytes if worker.has_first else 0,
        message_bytes=max((spec.size_bytes for spec in worker.message_specs), default=0),
    )


def _note_transients(
    worker: Worker,
    stage: Stage,
    batch: Batch,
    allocator: AllocatorBytes,
    first: dict[Action, int],
    later: dict[Action, int],
) -> None:
    """Of each kind of action of a stage: without gradients, and then with them."""
    stage.begin(batch)
    actions = worker.sample_actions(stage, batch)
    is_split = any(kind == Kind.W for kind, _ in actions)
    for found in (first, later):
        for kind, value in actions:
            if found is first and kind in _MAKES_GRADIENTS:
                for layer in stage.layers:
                    layer.zero_grad(set_to_none=True)
            before = allocator.held()
            allocator.start_peak()
            output = act(stage, kind, 0, value, batch, split=is_split)
            if found is later or kind in _MAKES_GRADIENTS:
                found[int(kind), stage.index] = allocator.peak() - before
            del output


def predicted_peak_bytes(program: Program, rank: int, memory: RankMemory, found: AllocatorPeak) -> int:
    """The most that a rank's allocator holds in a step: before each action what is held, and what the action needs.

    Parameters
    ----------
    program : Program
        What runs.
    rank : int
        Whose peak it is.
    memory : RankMemory
        What the ledger counted after each row of the rank.
    found : AllocatorPeak
        Of the rank's process. Its transients are used, its peak is not.

    Notes
    -----
    When an action starts, the message that it takes is still there and the next receive of that link is posted. The
    gradient that the action before sent may not have left. The ledger counts the data that stage 0 works on as its
    input; the allocator held it before the step. A tensor that two stages of a rank hand over counts twice here, as it
    does in the ledger.
    """
    rows = np.array(list(program.rows_of(rank)))
    kind, stage = program.kind[rows], program.stage[rows]
    takes, sends = program.message_in[rows] >= 0, program.message_out[rows] >= 0
    held = np.array(memory.activation_bytes)
    if memory.gradient_bytes is not None:
        held = held + np.array(memory.gradient_bytes)
    ends = kind == (Kind.W if (kind[stage == 0] == Kind.W).any() else Kind.B)
    data = np.cumsum(((kind == Kind.F).astype(int) - ends) * (stage == 0)) * found.data_bytes
    leaving = found.message_bytes * (sends & (kind != Kind.F))
    before = np.concatenate([[0], (held - data + leaving)[:-1]])
    buffers = np.array(memory.buffer_bytes) + takes * found.message_bytes
    needs = _needs(kind.tolist(), stage.tolist(), found.transient_bytes, found.first_transient_bytes)
    return int(found.base_bytes + (before + buffers + needs).max())


def _needs(kinds: list[int], stages: list[int], later: Mapping[Action, int], first: Mapping[Action, int]) -> np.ndarray:
    """What each row's action needs while it runs, an R as an F; of each stage the first B or W makes the gradients."""
    needs, with_gradients = [], set()
    for kind, stage in zip(kinds, stages, strict=True):
        makes_gradients = kind in _MAKES_GRADIENTS and stage not in with_gradients
        if makes_gradients:
            with_gradients.add(stage)
        alike = int(Kind.F) if kind == Kind.R else kind
        needs.append((first if makes_gradients else later)[alike, stage])
    return np.array(needs)
