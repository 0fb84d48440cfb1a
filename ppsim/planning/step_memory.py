"""Step memory: what each rank of a training step holds, by kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppsim.planning.pipeline_times import pipeline_program
from ppsim.planning.training_step import TrainingStep, works_of

Bytes = npt.NDArray[np.float64]
_STATE_BYTES = 12  # of Adam: a float32 weight and two float32 moments for each parameter
_MESSAGES_AHEAD = 2  # buffers each way: one that is filled and one that is used
# Chosen, not measured: room for a driver's context, collectives' buffers, workspaces of libraries and some fragments.
RESERVED_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each pipeline rank, arrays of shape (p,).

    parameters, gradients, optimizer: weights, their gradients, and Adam's float32 state. activations: at their peak.
    recomputed: of one block while its backward computes it again. buffers: messages under way. reserved: 2 GB, chosen,
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
    np.maximum.at(least, step.placement, held)
    return _with_activations(step, least)


def _stage_bytes(step: TrainingStep) -> tuple[Bytes, Bytes]:
    """Bytes of a microbatch on each stage from F to B, and from I to W: arrays of shape (stages,)."""
    embedding, blocks, head = step.layer_works
    stream = blocks[0].output_bytes  # of blocks of any kind
    held = step.stage_kinds @ np.array([each.activation_bytes - stream for each in blocks], np.float64) + stream
    held[0] += embedding.activation_bytes - (stream if step.stage_blocks[0] == 0 else embedding.output_bytes)
    held[-1] += head.activation_bytes - head.saved["input"]
    kept = step.stage_kinds @ np.array([each.weight_activation_bytes for each in blocks], np.float64)
    kept[0] += embedding.weight_activation_bytes
    kept[-1] += head.weight_activation_bytes
    return held, kept


def _with_activations(step: TrainingStep, activations: Bytes) -> StepMemory:
    """All kinds of memory beside these activations."""
    blocks, count, experts = step.layer_works.blocks, step.rank_parameters, step.rank_expert_parameters
    again = 0.0
    if step.recompute == "full":
        model, execution = step.layer_key
        plain = works_of(model, replace(execution, recompute="none")).blocks
        again = float(
            max(whole.activation_bytes - each.activation_bytes for whole, each in zip(plain, blocks, strict=True))
        )
    states = count
    if step.sharding == "optimizer":
        states = (count - experts) / step.replicas + experts / step.expert_replicas
    one = np.ones(step.pp)
    return StepMemory(
        parameters=count * step.execution.dtype_bytes,
        gradients=count * step.gradient_bytes,
        optimizer=states * _STATE_BYTES,
        activations=activations,
        recomputed=again * one,
        buffers=2 * _MESSAGES_AHEAD * blocks[0].output_bytes * one * (step.pp > 1),
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
