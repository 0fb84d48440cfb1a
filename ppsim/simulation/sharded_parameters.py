"""Sharded parameters: what gathering them and reducing their gradients takes in time, and what a rank holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.errors import InputError
from ppsim.network.collectives import BY_STAGE, Collectives
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.schedule.sharding import Sharding

if TYPE_CHECKING:
    from ppsim.simulation.engines.times import StepTimes
    from ppsim.trace.trace import Trace

Bytes = npt.NDArray[np.int64]


def collective_seconds(
    program: Program, stages: StageCosts, collectives: Collectives | None
) -> npt.NDArray[np.float64]:
    """Seconds of each collective, shape (collectives,); of none without `collectives`.

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost
        UNSHARD gathers their `parameter_bytes`, REDUCE_GRAD reduces their `trained_bytes`.
    collectives : Collectives or None
        How long each takes.

    Raises
    ------
    InputError
        If the schedule states no sharding, lacks the REDUCE_GRAD of a stage, or has another number of stages than
        what was measured.
    """
    if collectives is None:
        return np.zeros(0)
    schedule, table = program.schedule, program.collectives
    costs = CostTable.of(stages, schedule.microbatches).of_stages
    if schedule.copies > 1:
        raise InputError(
            f"collectives are of one copy of the model, and this schedule has {schedule.copies}: give a reduction"
        )
    if schedule.sharding is None:
        raise InputError("collectives are of sharded stages, and this schedule states none: take .with_sharding()")
    missing = [stage for stage in table.unreduced(schedule.stages) if costs[stage].trained_bytes]
    if missing and not schedule.is_forward_only:
        raise InputError(f"{missing[0]}REDUCE_GRAD is missing: add it, or take schedule.with_sharding()")
    for name in BY_STAGE:
        given = getattr(collectives, name)
        if given is not None and len(given) != schedule.stages:
            raise InputError(
                f"collectives.{name} has {len(given)} numbers for {schedule.stages} stages: give one for each"
            )
    gathering_s = collectives.unshard_s or [collectives.ring_s(cost.parameter_bytes) for cost in costs]
    reducing_s = collectives.reduce_s or [collectives.ring_s(cost.trained_bytes) for cost in costs]
    by_kind = np.array([gathering_s, reducing_s])
    found: npt.NDArray[np.float64] = by_kind[(table.kind == Kind.REDUCE_GRAD).astype(np.int64), table.stage]
    return found


def unsharded_levels(program: Program, whole_bytes: Sequence[int]) -> Bytes:
    """Bytes of whole parameters that a row's rank holds, from when the row takes effect until the next row does.

    Parameters
    ----------
    program : Program
        What is run.
    whole_bytes : sequence of int, one per stage
        Bytes of a stage's parameters.

    Returns
    -------
    array of shape (rows,)
        A stage's parameters are whole from where its UNSHARD stands to where its RESHARD stands. Where several stand
        between two rows, the most that is held on the way.
    """
    levels = np.zeros(len(program.stage), np.int64)
    for rank, entries in enumerate(program.schedule.sharding or ()):
        rows = program.rows_of(rank)
        if len(rows):
            levels[rows.start : rows.stop] = _rank_levels(program, rank, entries, whole_bytes)
    return levels


def _rank_levels(program: Program, rank: int, entries: Sharding, sizes: Sequence[int]) -> Bytes:
    """`unsharded_levels` of one rank."""
    first, last = program.rank_actions[rank : rank + 2].tolist()
    during = np.zeros(last - first, np.int64)  # held while each action runs
    until_next = np.zeros(last - first, np.int64)  # the most that is held between an action and the next
    held = action = 0
    for before, entry in [*entries, (last - first, None)]:
        during[action:before] = until_next[action:before] = held
        action = before
        if entry is not None and entry.kind != Kind.REDUCE_GRAD:
            held += sizes[entry.stage] if entry.kind == Kind.UNSHARD else -sizes[entry.stage]
            if before > 0:
                until_next[before - 1] = max(until_next[before - 1], held)
    rows = program.rows_of(rank)
    most: Bytes = np.maximum(during, until_next)[program.row_action[rows.start : rows.stop] - first]
    return most


def sharded_memory(trace: Trace, stages: StageCosts, collectives: Collectives | None, times: StepTimes) -> Trace:
    """A trace with the times of its collectives, and with what its ranks hold of sharded parameters and gradients.

    Parameters
    ----------
    trace : Trace
        A predicted step whose parameters and gradients are whole.
    stages : sequence of StageCost
        The cost of each stage.
    collectives : Collectives or None
        Over how many replicas parameters are sharded. None: the trace is returned unchanged.
    times : StepTimes
        When the collectives ran.

    Notes
    -----
    A rank holds its share of the parameters all the time, and whole ones beside it between UNSHARD and RESHARD. Of the
    gradients it holds the whole from a stage's first B or W until its REDUCE_GRAD has ended, then its share.
    """
    if collectives is None:
        return trace
    program, table = trace.program, trace.program.collectives
    costs = CostTable.of(stages, trace.schedule.microbatches).of_stages
    parameters = [cost.parameter_bytes for cost in costs]
    whole = collectives.whole_bytes or parameters
    shares = np.zeros(program.ranks, np.int64)
    np.add.at(shares, np.asarray(trace.schedule.placement), collectives.parameter_shares(parameters))
    is_gather = table.kind == Kind.UNSHARD
    begun_s, ended_s = times.of_side(copies=False)
    changes = {
        "parameter_bytes": shares,
        "unsharded_bytes": unsharded_levels(program, whole),
        "unshard_start_s": begun_s[is_gather],
        "unshard_end_s": ended_s[is_gather],
        "unshard_bytes": np.array(whole, np.int64)[table.stage[is_gather]],
    }
    if not program.schedule.is_forward_only and trace.gradient_bytes is not None:
        start_s, end_s = np.zeros((2, trace.schedule.stages))
        np.maximum.at(end_s, program.stage, trace.end_s)  # of stages that reduce nothing
        start_s[:] = end_s
        start_s[table.stage[~is_gather]] = begun_s[~is_gather]
        end_s[table.stage[~is_gather]] = ended_s[~is_gather]
        trained = np.array([cost.trained_bytes for cost in costs], np.int64)
        spared = trained - np.array(collectives.gradient_shares(trained.tolist()), np.int64)
        gradients = trace.gradient_bytes.copy()
        for stage, rank in enumerate(trace.schedule.placement):
            rows = program.rows_of(rank)
            inside = slice(rows.start, rows.stop)
            gradients[inside] -= np.where(trace.effect_s[inside] >= end_s[stage], spared[stage], 0)
        changes |= {
            "reduce_start_s": start_s,
            "reduce_end_s": end_s,
            "reduce_bytes": trained,
            "gradient_bytes": gradients,
        }
    return replace(trace, **changes)
