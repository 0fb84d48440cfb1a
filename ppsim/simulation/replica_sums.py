"""Replica sums: when the gradients of each stage are added up over data-parallel replicas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.network.all_reduce import Reduction
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]


def gradient_rows(program: Program, reduction: Reduction | None) -> npt.NDArray[np.int64]:
    """The row at whose end each stage's gradients are complete: its last B or W.

    Returns
    -------
    array of shape (stages,)
        Empty where nothing is added up: without a reduction, with one replica, and in an evaluation.
    """
    if reduction is None or reduction.replicas == 1 or program.schedule.is_forward_only:
        return np.zeros(0, np.int64)
    rows = np.flatnonzero((program.kind == Kind.B) | (program.kind == Kind.W))
    last = np.zeros(program.schedule.stages, np.int64)
    last[program.stage[rows]] = rows  # a stage is on one rank, whose rows ascend, so its last row stays
    return last


def sum_times(program: Program, stages: StageCosts, reduction: Reduction, ready_s: Seconds) -> tuple[Seconds, Seconds]:
    """When each sum starts and ends: once its gradients are complete, one after another on each rank.

    Parameters
    ----------
    program : Program
        What ran.
    stages : sequence of StageCost
        Their `trained_bytes` are added up.
    reduction : Reduction
        What one sum takes.
    ready_s : array of shape (samples, stages)
        When the gradients of each stage are complete, in each sample of the step.

    Returns
    -------
    start_s, end_s : arrays of shape (samples, stages)
    """
    costs = CostTable(stages, program.schedule.microbatches).of_stages
    taken_s = np.array([reduction.seconds(cost.trained_bytes) for cost in costs])
    placement, samples = np.asarray(program.schedule.placement), np.arange(len(ready_s))
    start_s, end_s = np.empty_like(ready_s), np.empty_like(ready_s)
    free_s = np.full((len(ready_s), program.ranks), -np.inf)
    for stage in np.argsort(ready_s, axis=1, kind="stable").T:  # the stage that is next in each sample
        rank = placement[stage]
        start_s[samples, stage] = np.maximum(ready_s[samples, stage], free_s[samples, rank])
        free_s[samples, rank] = end_s[samples, stage] = start_s[samples, stage] + taken_s[stage]
    return start_s, end_s


def with_replica_sums(trace: Trace, stages: StageCosts, reduction: Reduction | None) -> Trace:
    """The trace with when its gradients are added up. It is unchanged where nothing is."""
    rows = gradient_rows(trace.program, reduction)
    if reduction is None or not len(rows):
        return trace
    start_s, end_s = sum_times(trace.program, stages, reduction, trace.end_s[rows][None])
    costs = CostTable(stages, trace.schedule.microbatches).of_stages
    sizes = np.array([cost.trained_bytes for cost in costs], np.int64)
    return replace(trace, reduce_start_s=start_s[0], reduce_end_s=end_s[0], reduce_bytes=sizes)
