"""Step memory: what each rank of a training step holds, by kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ppsim.estimate.layer_work import block_work, embedding_work, head_work
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Execution, LayerWork
from ppsim.planning.pipeline_times import pipeline_program
from ppsim.planning.training_step import TrainingStep
from ppsim.schedule.action import Kind

Bytes = npt.NDArray[np.float64]
_STATE_BYTES = 12  # of Adam: a float32 weight and two float32 moments for each parameter
_MESSAGES_AHEAD = 2  # buffers each way: one that is filled and one that is used
RESERVED_BYTES = 2_000_000_000  # what the driver, libraries and the allocator's fragments take; see `StepMemory`


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each pipeline rank, arrays of shape (p,).

    parameters, gradients, optimizer: weights, their gradients, and Adam's float32 state. activations: at their peak.
    recomputed: of one block while its backward computes it again. buffers: messages under way. reserved: a fixed 2 GB
    for what is not modelled (the driver's context, libraries' workspaces, fragments).
    """

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    recomputed: Bytes
    buffers: Bytes
    reserved: Bytes

    @property
    def total(self) -> Bytes:
        """All of it."""
        return np.asarray(np.sum([getattr(self, name) for name in MEMORY_KINDS], axis=0), np.float64)


MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "recomputed", "buffers", "reserved")


def step_memory(step: TrainingStep) -> StepMemory:
    """What each rank of a step holds.

    Notes
    -----
    Activations of a stage are the sum of its layers', as in `ppsim.costs.stage_cost.stage_cost`; the logits, which the
    last stage does not hand on, count in it. The peak is taken over the rank's order, so it is exact for any schedule.
    """
    embedding, block, head = _layers(step.padded_model, step.execution)
    blocks = np.array(step.stage_blocks, np.float64)
    held = blocks * (block.activation_bytes - block.output_bytes) + block.output_bytes
    held[0] += embedding.activation_bytes - (block.output_bytes if blocks[0] == 0 else embedding.output_bytes)
    held[-1] += head.activation_bytes - head.saved["input"]
    kept = blocks * block.weight_activation_bytes
    kept[0] += embedding.weight_activation_bytes
    kept[-1] += head.weight_activation_bytes
    parameters = blocks * block.parameter_bytes
    parameters[0] += embedding.parameter_bytes
    parameters[-1] += head.parameter_bytes
    if step.model.tied and step.pp == 1:
        parameters[-1] -= step.padded_model.vocabulary * step.model.hidden // step.tp * step.execution.dtype_bytes
    placement, levels = order_levels(step.schedule, step.pp, step.microbatches, step.stages_per_rank)
    amounts = np.concatenate([held, kept])
    activations = np.array([(level @ amounts).max() for level in levels])
    own = np.bincount(placement, weights=parameters, minlength=step.pp).astype(np.float64)
    count = own / step.execution.dtype_bytes
    again = 0.0
    if step.recompute == "full":
        plain = _layers(step.padded_model, _without_recompute(step.execution))[1]
        again = float(plain.activation_bytes - block.activation_bytes)
    one = np.ones(step.pp)
    moving = step.pp > 1
    return StepMemory(
        parameters=own,
        gradients=count * step.gradient_bytes,
        optimizer=count * _STATE_BYTES / (step.dp if step.sharding == "optimizer" else 1),
        activations=activations,
        recomputed=again * one,
        buffers=(2 * _MESSAGES_AHEAD * block.output_bytes * one) * moving,
        reserved=RESERVED_BYTES * one,
    )


@lru_cache(maxsize=4096)
def _layers(model: Transformer, execution: Execution) -> tuple[LayerWork, LayerWork, LayerWork]:
    return embedding_work(model, execution), block_work(model, execution), head_work(model, execution)


def _without_recompute(execution: Execution) -> Execution:
    return replace(execution, recompute="none")


@lru_cache(maxsize=512)
def order_levels(
    schedule: str, ranks: int, microbatches: int, stages_per_rank: int
) -> tuple[npt.NDArray[np.int64], tuple[npt.NDArray[np.float64], ...]]:
    """How many microbatches each rank holds of each stage, at each of its actions where that differs.

    Returns
    -------
    placement : array of shape (stages,)
    levels : for each rank an array of shape (moments, 2 stages)
        First those held from F to B (or I), then those from I to W.
    """
    stages = ranks * stages_per_rank
    if ranks == 1 and stages_per_rank == 1 and schedule == "1f1b":
        return np.zeros(1, np.int64), (np.array([[1.0, 0.0]]),)
    program = pipeline_program(schedule, ranks, microbatches, stages_per_rank)
    levels = []
    for rank in range(ranks):
        rows = np.array(program.rows_of(rank))
        kind, stage = program.kind[rows], program.stage[rows]
        change = np.zeros((len(rows), 2 * stages))
        at = np.arange(len(rows))
        is_forward, is_input, is_weight = kind == Kind.F, kind == Kind.I, kind == Kind.W
        change[at[is_forward], stage[is_forward]] = 1
        is_back = (kind == Kind.B) | is_input
        change[at[is_back], stage[is_back]] = -1
        change[at[is_input], stages + stage[is_input]] = 1
        change[at[is_weight], stages + stage[is_weight]] = -1
        levels.append(_outermost(np.cumsum(change, axis=0)))
    return np.array(program.schedule.placement, np.int64), tuple(levels)


def _outermost(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The different rows, without those that another row exceeds everywhere."""
    different = np.unique(levels, axis=0)
    order = np.argsort(-different.sum(axis=1), kind="stable")
    kept: list[npt.NDArray[np.float64]] = []
    for row in different[order]:
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept)
