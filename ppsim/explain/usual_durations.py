"""Usual durations: how long actions usually take, and edge times in which none takes longer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import StageCosts
from ppsim.explain.step_graph import EdgeTimes, StepGraph
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.simulation.timed_program import row_durations
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

# As a share of the makespan: shorter times are rounding. A time of a step is a sum of up to some thousand floats, each
# rounded by up to 1e-16 of it.
ROUNDING = 1e-12
_ROW_ROUNDING = 1e-9  # as a share of a row's duration, which is a difference of two times of the step


def usual_of_rows(trace: Trace, expected: StageCosts | None) -> Seconds:
    """What each row usually takes.

    Parameters
    ----------
    trace : Trace
        The step.
    expected : sequence of StageCost, or None
        What the stages should take. None: the median of this trace over all rows of the same stage and kind, with those
        of overlapped pairs apart.

    Returns
    -------
    array of shape (rows,)
        Seconds.
    """
    program = trace.program
    if expected is not None:
        # Pairs that overlap and microbatches of other length were meant to be; slow ranks were not.
        return row_durations(program, expected, overlap=trace.conditions.overlap, scale=trace.conditions.scale)
    lengths = trace.end_s - trace.start_s
    group = (program.stage * len(Kind) + program.kind) * 2 + _is_in_pair(program)
    by_group = np.argsort(group, kind="stable")
    usual = np.empty(len(lengths))
    for rows in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
        usual[rows] = np.median(lengths[rows])
    return usual


def excess_of_rows(trace: Trace, usual_s: Seconds) -> Seconds:
    """By how much each row takes longer than usual, shape (rows,). Rounding counts as 0, and so does a shorter row."""
    lengths = trace.end_s - trace.start_s
    is_longer = lengths > usual_s * (1 + _ROW_ROUNDING) + ROUNDING * trace.makespan_s
    return np.where(is_longer, lengths - usual_s, 0.0)


def cut_to_usual(graph: StepGraph, usual_s: Seconds) -> EdgeTimes:
    """The step's edge times with no row longer than usual. The graph's own object if none is."""
    excess = excess_of_rows(graph.trace, usual_s)
    if not excess.any():
        return graph.edge_times
    shorter_s = np.add.reduceat(excess, graph.program.action_start[:-1])
    return graph.edge_times._replace(compute_s=graph.edge_times.compute_s - shorter_s)


def without_messages(edge_times: EdgeTimes) -> EdgeTimes:
    """The edge times if messages took no time."""
    nothing = np.zeros_like(edge_times.post_s)
    return edge_times._replace(post_s=nothing, occupied_s=nothing, latency_s=nothing)


def without_collectives(graph: StepGraph, edge_times: EdgeTimes) -> EdgeTimes:
    """The edge times if no action waited for its stage's parameters."""
    return edge_times._replace(device_s=edge_times.device_s - graph.collective_s)


def without_copies(graph: StepGraph, edge_times: EdgeTimes) -> EdgeTimes:
    """The edge times if no action waited for activations from host memory either."""
    return edge_times._replace(device_s=edge_times.device_s - graph.copy_s)


def without_device_waits(edge_times: EdgeTimes) -> EdgeTimes:
    """The edge times if every action started as soon as its rank is free and its inputs are there."""
    return edge_times._replace(device_s=np.zeros_like(edge_times.device_s))


def equal_stages(graph: StepGraph, usual_s: Seconds) -> EdgeTimes:
    """The edge times of equal stages alone: every row takes what rows of its kind usually take on average."""
    program = graph.program
    group = program.kind * 2 + _is_in_pair(program)
    mean = np.bincount(group, usual_s) / np.maximum(np.bincount(group), 1)
    compute_s = np.add.reduceat(mean[group], program.action_start[:-1])
    return without_device_waits(without_messages(graph.edge_times._replace(compute_s=compute_s)))


def _is_in_pair(program: Program) -> npt.NDArray[np.bool_]:
    """Whether each row is half of an overlapped pair, shape (rows,)."""
    is_pair: npt.NDArray[np.bool_] = np.diff(program.action_start)[program.row_action] == 2
    return is_pair
