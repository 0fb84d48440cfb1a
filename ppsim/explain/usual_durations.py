"""Durations: what actions usually take, and the step's delays if they took no longer, or all the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.explain.step_graph import Delays, StepGraph
from ppsim.schedule.action import Kind
from ppsim.simulation.timed_program import row_durations
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

DUST = 1e-12  # of the makespan: shorter times are rounding


def usual_durations(trace: Trace, expected: Sequence[StageCost] | None) -> Seconds:
    """What each row usually takes, shape (rows,)."""
    program = trace.program
    if expected is not None:
        # Pairs that overlap and microbatches of other length were meant to be; slow ranks were not.
        return row_durations(program, expected, overlap=trace.conditions.overlap, scale=trace.conditions.scale)
    lengths = trace.end_s - trace.start_s
    in_pair = np.diff(program.action_start)[program.row_action] == 2
    group = (program.stage * len(Kind) + program.kind) * 2 + in_pair
    by_group = np.argsort(group, kind="stable")
    usual = np.empty(len(lengths))
    for rows in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
        usual[rows] = np.median(lengths[rows])
    return usual


def excess_durations(trace: Trace, usual: Seconds) -> Seconds:
    """By how much each row takes longer than usual, shape (rows,), none negative; what is mere rounding is 0."""
    lengths = trace.end_s - trace.start_s
    return np.where(lengths > usual * (1 + 1e-9) + DUST * trace.makespan_s, lengths - usual, 0.0)


def cut_to_usual(graph: StepGraph, usual: Seconds) -> Seconds | None:
    """Each action's time with its rows cut to their usual durations, (actions,); None if none is longer."""
    excess = excess_durations(graph.trace, usual)
    if not excess.any():
        return None
    return graph.delays.compute_s - np.add.reduceat(excess, graph.program.action_start[:-1])


def balanced(graph: StepGraph, usual: Seconds) -> Delays:
    """The step of equal stages with free messages: every row takes its kind's mean usual time."""
    program = graph.program
    in_pair = np.diff(program.action_start)[program.row_action] == 2
    group = program.kind * 2 + in_pair
    mean = np.bincount(group, usual) / np.maximum(np.bincount(group), 1)
    compute_s = np.add.reduceat(mean[group], program.action_start[:-1])
    return replace(without_messages(graph, compute_s), device_s=np.zeros(program.actions))


def without_messages(graph: StepGraph, cut: Seconds | None) -> Delays:
    """The step with usual durations and free messages."""
    nothing = np.zeros(len(graph.program.messages))
    return replace(
        graph.delays,
        compute_s=graph.delays.compute_s if cut is None else cut,
        post_s=nothing,
        occupied_s=nothing,
        latency_s=nothing,
    )
