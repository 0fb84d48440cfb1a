"""Offloaded activations: what copying them takes in time, and what a rank and its host hold meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.network.host_link import HostLink
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program

if TYPE_CHECKING:
    from ppsim.simulation.engines.times import StepTimes
    from ppsim.trace.trace import Trace

Bytes = npt.NDArray[np.int64]


def copied_bytes(program: Program, stages: StageCosts) -> Bytes:
    """Bytes of each copy, shape (copies,).

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of each stage for one microbatch, or for each microbatch.

    Returns
    -------
    array of shape (copies,)
        `moved_bytes`; of a microbatch that has an R `kept_bytes`, all that an F leaves.
    """
    table, costs = program.offload, CostTable.of(stages, program.schedule.microbatches)
    cell = table.stage, costs.column(table.microbatch)
    whole = costs.table(lambda cost: cost.moved_bytes, np.int64)[cell]
    until_again = costs.table(lambda cost: cost.kept_bytes, np.int64)[cell]
    again = program.kind == Kind.R
    has_again = np.zeros((program.schedule.stages, program.schedule.microbatches), bool)
    has_again[program.stage[again], program.microbatch[again]] = True
    found: Bytes = np.where(has_again[table.stage, table.microbatch], until_again, whole)
    return found


def copy_seconds(program: Program, stages: StageCosts, host_link: HostLink | None) -> npt.NDArray[np.float64]:
    """Seconds of each copy, shape (copies,): 0 without `host_link`."""
    if not len(program.offload.stage):
        return np.zeros(0)
    sizes = copied_bytes(program, stages)
    found: npt.NDArray[np.float64] = np.zeros(len(sizes)) if host_link is None else host_link.copy_s(sizes)
    return found


def offloaded_memory(trace: Trace, stages: StageCosts, times: StepTimes) -> Trace:
    """A trace with the times of its copies, and with what its ranks and their hosts hold because of them.

    Parameters
    ----------
    trace : Trace
        A predicted step that holds all its activations on its devices.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of each stage for one microbatch, or for each microbatch.
    times : StepTimes
        When the copies ran.

    Notes
    -----
    A device holds less from the end of O to the start of L. Its host holds as much from the start of O to the end of L.
    Of each row the most is taken that is held until the next one takes effect.
    """
    program, table = trace.program, trace.program.offload
    if not len(table.stage) or trace.activation_bytes is None:
        return trace
    start_s, end_s = times.of_side(copies=True)
    sizes, is_out = copied_bytes(program, stages), table.kind == Kind.O
    signed = np.where(is_out, sizes, -sizes)
    return replace(
        trace,
        activation_bytes=trace.activation_bytes + _most(trace, np.where(is_out, end_s, start_s), -signed),
        host_bytes=_most(trace, np.where(is_out, start_s, end_s), signed),
        copy_start_s=start_s,
        copy_end_s=end_s,
        copy_bytes=sizes,
    )


def _most(trace: Trace, moments_s: npt.NDArray[np.float64], change: Bytes) -> Bytes:
    """The largest sum of a rank's changes from when each row takes effect to when the next does, shape (rows,).

    What happens at one moment goes in the sequence of the order.
    """
    program, table = trace.program, trace.program.offload
    most = np.zeros(len(program.stage), np.int64)
    place_of = _places(program)
    for rank in range(program.ranks):
        rows, entries = np.array(program.rows_of(rank), np.int64), np.flatnonzero(table.rank == rank)
        if not len(rows) or not len(entries):
            continue
        moment_s = np.concatenate([trace.effect_s[rows], moments_s[entries]])
        # A copy that stands before an action comes before its rows.
        sequence = np.concatenate([2 * program.row_action[rows] + 1, 2 * place_of[entries]])
        is_row = np.arange(len(moment_s)) < len(rows)
        in_time = np.lexsort((np.arange(len(moment_s)), sequence, moment_s))
        held = np.cumsum(np.concatenate([np.zeros(len(rows), np.int64), change[entries]])[in_time])
        begins = np.flatnonzero(is_row[in_time])
        most[rows[in_time[begins]]] = np.maximum.reduceat(held, begins)
    return most


def _places(program: Program) -> npt.NDArray[np.int64]:
    """The action that each copy stands before, shape (copies,); for those after a rank's last the one that follows."""
    slot, actions = program.offload.slot, program.actions
    return np.where(slot < actions, slot, program.rank_actions[np.maximum(slot - actions, 0) + 1]).astype(np.int64)
