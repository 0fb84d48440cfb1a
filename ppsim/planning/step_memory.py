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
from ppsim.schedule.named.registry import schedule_placement

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
    held, kept = _stage_bytes(step)
    return _with_activations(step, _peaks(step, held, kept))


def least_memory(step: TrainingStep) -> StepMemory:
    """What each rank holds at least: one microbatch on its fullest stage, however the schedule orders the rest."""
    held, _ = _stage_bytes(step)
    least = np.zeros(step.pp)
    np.maximum.at(least, list(schedule_placement(step.schedule, step.pp, step.stages_per_rank)), held)
    return _with_activations(step, least)


def _stage_bytes(step: TrainingStep) -> tuple[Bytes, Bytes]:
    """Bytes of a microbatch on each stage from F to B, and from I to W: arrays of shape (stages,)."""
    embedding, block, head = _layers(step.padded_model, step.execution)
    blocks = np.array(step.stage_blocks, np.float64)
    held = blocks * (block.activation_bytes - block.output_bytes) + block.output_bytes
    held[0] += embedding.activation_bytes - (block.output_bytes if blocks[0] == 0 else embedding.output_bytes)
    held[-1] += head.activation_bytes - head.saved["input"]
    kept = blocks * block.weight_activation_bytes
    kept[0] += embedding.weight_activation_bytes
    kept[-1] += head.weight_activation_bytes
    return held, kept


def _with_activations(step: TrainingStep, activations: Bytes) -> StepMemory:
    """All kinds of memory beside these activations."""
    embedding, block, head = _layers(step.padded_model, step.execution)
    parameters = np.array(step.stage_blocks, np.float64) * block.parameter_bytes
    parameters[0] += embedding.parameter_bytes
    parameters[-1] += head.parameter_bytes
    if step.model.tied and step.pp == 1:
        parameters[-1] -= step.padded_model.vocabulary * step.model.hidden // step.tp * step.execution.dtype_bytes
    placement = schedule_placement(step.schedule, step.pp, step.stages_per_rank)
    own = np.bincount(placement, weights=parameters, minlength=step.pp).astype(np.float64)
    count = own / step.execution.dtype_bytes
    again = 0.0
    if step.recompute == "full":
        plain = _layers(step.padded_model, replace(step.execution, recompute="none"))[1]
        again = float(plain.activation_bytes - block.activation_bytes)
    one = np.ones(step.pp)
    return StepMemory(
        parameters=own,
        gradients=count * step.gradient_bytes,
        optimizer=count * _STATE_BYTES / (step.dp if step.sharding == "optimizer" else 1),
        activations=activations,
        recomputed=again * one,
        buffers=2 * _MESSAGES_AHEAD * block.output_bytes * one * (step.pp > 1),
        reserved=RESERVED_BYTES * one,
    )


def _peaks(step: TrainingStep, held: Bytes, kept: Bytes) -> Bytes:
    """The most that each rank holds at once, shape (p,)."""
    if step.schedule == "1f1b":  # Narayanan et al., SC 2021; on one rank any order of whole backwards is the same
        return held * np.minimum(step.microbatches, step.pp - np.arange(step.pp))
    from ppsim.planning.order_peaks import order_peaks  # numba loads for a second, and only here

    program = pipeline_program(step.schedule, step.pp, step.microbatches, step.stages_per_rank)
    first_row = program.action_start[program.rank_actions]
    return order_peaks(program.kind, program.stage, first_row, held, kept)


@lru_cache(maxsize=4096)
def _layers(model: Transformer, execution: Execution) -> tuple[LayerWork, LayerWork, LayerWork]:
    return embedding_work(model, execution), block_work(model, execution), head_work(model, execution)
