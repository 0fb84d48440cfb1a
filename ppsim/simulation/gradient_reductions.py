"""Gradient reductions: when each stage's gradients are summed over the data-parallel replicas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.errors import InputError
from ppsim.network.all_reduce import Reduction
from ppsim.schedule.program import Program
from ppsim.simulation.engines.times import check_finite
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]


def gradient_rows(program: Program, reduction: Reduction | None) -> npt.NDArray[np.integer]:
    """Find the row at whose end each stage's gradients are complete: its last B or W.

    Returns
    -------
    array of shape (stages,)
        Empty where nothing is reduced: without a `reduction`, with one replica of one copy of the model, and in an
        evaluation (F only).
    """
    schedule = program.schedule
    if reduction is None or reduction.replicas * schedule.copies == 1 or schedule.is_forward_only:
        return np.zeros(0, np.int64)
    return program.last_gradient_row


def ready_times(trace: Trace) -> Seconds:
    """When the gradients of each stage were complete, shape (stages,); empty where its conditions reduce nothing."""
    ready_s: Seconds = trace.end_s[gradient_rows(trace.program, trace.conditions.reduction)]
    return ready_s


def stages_by_completion(program: Program) -> list[int]:
    """The stages of each rank, rank after rank, in the order in which their gradients are complete."""
    stages: list[int] = np.argsort(program.last_gradient_row, kind="stable").tolist()
    return stages


def reduction_times(
    program: Program,
    stages: StageCosts,
    reduction: Reduction,
    ready_s: Seconds,
    *,
    gradients_ready_s: npt.ArrayLike | None = None,
) -> tuple[Seconds, Seconds]:
    """Time each stage's reduction. It starts once the gradients are complete; those of a rank run one after another.

    Copies of a stage are reduced together, over the ranks that hold them and their replicas.

    Parameters
    ----------
    program : Program
        What ran.
    stages : sequence of StageCost
        Their `trained_bytes` are reduced.
    reduction : Reduction
        How long one reduction of so many bytes takes.
    ready_s : array of shape (samples, stages)
        When the gradients of each stage are complete, in each sample of the step.
    gradients_ready_s : array of shape (stages,), optional
        When they are on the slowest replica (see `Conditions`).

    Returns
    -------
    start_s, end_s : arrays of shape (samples, stages)

    Raises
    ------
    InputError
        If `gradients_ready_s` has another shape, or a reduction takes longer than a float holds.
    """
    schedule = program.schedule
    if gradients_ready_s is not None:
        if np.shape(gradients_ready_s) != (schedule.stages,):
            raise InputError(
                f"gradients_ready_s must have one number for each of {schedule.stages} stages, got the shape "
                f"{np.shape(gradients_ready_s)}"
            )
        ready_s = np.maximum(ready_s, gradients_ready_s)
    shape = schedule.copies, schedule.model_stages
    holders = np.asarray(schedule.placement).reshape(shape)
    costs = CostTable.of(stages, schedule.microbatches).of_stages[: schedule.model_stages]
    taken_s = np.array(
        [
            replace(reduction, replicas=reduction.replicas * len(set(ranks))).seconds(cost.trained_bytes)
            for cost, ranks in zip(costs, holders.T.tolist(), strict=True)
        ]
    )
    samples = np.arange(len(ready_s))
    ready_s = ready_s.reshape(-1, *shape).max(axis=1)
    start_s, end_s = np.empty_like(ready_s), np.empty_like(ready_s)
    free_s = np.full((len(ready_s), program.ranks), -np.inf)
    for stage in np.argsort(ready_s, axis=1, kind="stable").T:  # by sample: the stage that is ready next
        ranks = holders[:, stage]
        start_s[samples, stage] = np.maximum(ready_s[samples, stage], free_s[samples, ranks].max(axis=0))
        free_s[samples, ranks] = end_s[samples, stage] = start_s[samples, stage] + taken_s[stage]
    check_finite(end_s)
    start_s, end_s = (np.tile(each, schedule.copies) for each in (start_s, end_s))
    return start_s, end_s


def with_reductions(trace: Trace, stages: StageCosts) -> Trace:
    """Add the starts, ends and bytes of the reductions in its conditions to a trace; unchanged without any."""
    reduction, gradients_ready_s = trace.conditions.reduction, trace.conditions.gradients_ready_s
    rows = gradient_rows(trace.program, reduction)
    if reduction is None or not len(rows):
        return trace
    start_s, end_s = reduction_times(
        trace.program, stages, reduction, trace.end_s[rows][None], gradients_ready_s=gradients_ready_s
    )
    costs = CostTable.of(stages, trace.schedule.microbatches).of_stages
    sizes = np.array([cost.trained_bytes for cost in costs], np.int64)
    return replace(trace, reduce_start_s=start_s[0], reduce_end_s=end_s[0], reduce_bytes=sizes)
