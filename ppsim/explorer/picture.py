"""Picture: a step as the columns of numbers that the page draws, and what it says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.explain.attribution import PARTS, Attribution, attribute
from ppsim.explain.idle_spans import idle_spans
from ppsim.schedule.action import COMPUTE_KINDS, Kind
from ppsim.schedule.schedule import Schedule
from ppsim.trace.trace import Trace

Document = dict[str, Any]
Column = npt.NDArray[Any]


def picture_of(trace: Trace) -> Document:
    """A step as JSON values: columns of its rows, messages, idle spans and critical path, and its numbers.

    Parameters
    ----------
    trace : Trace
        A simulated or a measured step.

    Returns
    -------
    dict
        All times are in seconds from the step's start.
    """
    found = attribute(trace)
    program, zero_s = trace.program, float(trace.start_s.min())
    messages, graph = program.messages, found.graph
    known = trace.message_times_s
    # Where nobody recorded messages, their times are those that the attribution infers.
    message_start, message_left, message_arrival = (
        (graph.times.message_start_s, graph.shown_left_s, graph.times.arrival_s)
        if known is None
        else [times_s - zero_s for times_s in known]
    )
    return {
        **_about(trace.schedule),
        "clock": trace.clock,
        "unknown": trace.unknown,
        "rows": {
            **_row_columns(program.stage, program.kind, program.microbatch, program.rank, program.row_action),
            "start": (trace.start_s - zero_s).tolist(),
            "end": (trace.end_s - zero_s).tolist(),
            "effect": (trace.effect_s - zero_s).tolist(),
            "held": _known(trace.activation_bytes),
            "needs": program.needs.tolist(),
            "messageIn": program.message_in.tolist(),
            "messageOut": program.message_out.tolist(),
            "slack": found.slack_s.tolist(),
            "awaits": _awaited(trace),
        },
        "messages": {
            "producer": messages.producer.tolist(),
            "consumer": messages.consumer.tolist(),
            "start": message_start.tolist(),
            "left": message_left.tolist(),
            "arrival": message_arrival.tolist(),
            "bytes": _known(trace.message_bytes),
        },
        "idle": _idle_columns(found),
        "critical": _path_columns(found),
        "beside": _side_columns(trace, zero_s),
        "numbers": {
            "makespan": trace.makespan_s,
            "step": trace.step_s,
            "bubble": trace.bubble_fraction,
            "rankTime": trace.rank_time_s.tolist(),
            "rankBubble": trace.bubble_s.tolist(),
            "peak": _known(trace.peak_activation_bytes),
            "parts": found.fractions,
            "path": found.critical_path.by_what_s,
        },
    }


def order_picture(schedule: Schedule, stages: Sequence[StageCost]) -> Document:
    """Orders that cannot run, as JSON values: each rank's actions one after another, without waiting."""
    rank = np.repeat(np.arange(schedule.ranks), [len(order.stage) for order in schedule.orders])
    stage, kind, microbatch = (
        np.concatenate([getattr(order, name) for order in schedule.orders]) for name in ("stage", "kind", "microbatch")
    )
    action = np.cumsum(np.concatenate([_begins(order.joined) for order in schedule.orders])) - 1
    alone_s = np.array([[cost.alone_s[each.name] for cost in stages] for each in COMPUTE_KINDS])
    durations_s = alone_s[np.searchsorted(COMPUTE_KINDS, kind), stage]
    end_s = np.cumsum(durations_s)
    before_s = np.concatenate([[0.0], end_s])[np.searchsorted(rank, rank)]  # by the ranks above
    end_s = end_s - before_s
    return {
        **_about(schedule),
        "clock": "order",
        "rows": {
            **_row_columns(stage, kind, microbatch, rank, action),
            "start": (end_s - durations_s).tolist(),
            "end": end_s.tolist(),
        },
        "numbers": {"makespan": float(end_s.max())},
    }


def usual_seconds(trace: Trace) -> dict[str, list[float]]:
    """The median seconds of each kind that a step has, by stage: what its stages cost if nothing else is known."""
    program, lengths_s = trace.program, trace.end_s - trace.start_s
    found = {}
    for kind in COMPUTE_KINDS:
        if (program.kind == kind).any():
            by_stage = [
                lengths_s[(program.kind == kind) & (program.stage == stage)] for stage in range(trace.schedule.stages)
            ]
            if all(len(each) for each in by_stage):
                found[kind.name] = [float(np.median(each)) for each in by_stage]
    return found


def _about(schedule: Schedule) -> Document:
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "copies": schedule.copies,
        "microbatches": schedule.microbatches,
        "placement": list(schedule.placement),
        "csv": schedule.to_csv(sharding=True, offload=True),
    }


def _known(column: npt.NDArray[Any] | None) -> list[Any] | None:
    return None if column is None else list(column.tolist())


def _begins(joined: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether each part is the first of its action."""
    return ~np.concatenate([[False], joined[:-1]])[: len(joined)]


def _row_columns(stage: Column, kind: Column, microbatch: Column, rank: Column, action: Column) -> Document:
    """Columns of rows as lists; kinds by their place among those that compute."""
    columns = {"stage": stage, "kind": np.searchsorted(COMPUTE_KINDS, kind), "microbatch": microbatch}
    return {name: column.tolist() for name, column in (columns | {"rank": rank, "action": action}).items()}


def _idle_columns(found: Attribution) -> Document:
    spans = idle_spans(found)
    return {
        "rank": spans.rank.tolist(),
        "action": spans.action.tolist(),
        "begin": spans.begin_s.tolist(),
        "end": spans.end_s.tolist(),
        "parts": {part: spans.parts_s[:, column].tolist() for column, part in enumerate(PARTS)},
    }


def _path_columns(found: Attribution) -> Document:
    segments = found.critical_path.segments
    return {
        "what": [each.what for each in segments],
        "isWait": [each.is_wait for each in segments],
        "begin": [each.start_s for each in segments],
        "end": [each.end_s for each in segments],
        "rank": [each.rank for each in segments],
        "destination": [each.destination for each in segments],
        "row": [each.row for each in segments],
        "message": [each.message for each in segments],
    }


def _side_columns(trace: Trace, zero_s: float) -> Document:
    side = trace.side_work
    return {
        "name": [str(action) for action in side.actions()],
        "kind": [Kind(kind).name for kind in side.kind.tolist()],
        "rank": side.rank.tolist(),
        "start": (side.start_s - zero_s).tolist(),
        "end": (side.end_s - zero_s).tolist(),
        "bytes": side.size_bytes.tolist(),
    }


def _awaited(trace: Trace) -> list[list[int]]:
    """For each row what it waits for beside computations, by place among `beside`: its stage's UNSHARD, and its L."""
    program, side = trace.program, trace.side_work
    found: list[list[int]] = [[] for _ in range(len(program.stage))]
    is_gather = program.collectives.kind == Kind.UNSHARD
    is_shown = trace.unshard_start_s is not None, trace.copy_start_s is not None
    for shown, awaited, kinds, entry in (
        (is_shown[0], program.collectives.gather, (Kind.UNSHARD,), np.cumsum(is_gather) - 1),
        (is_shown[1], program.offload.load, (Kind.O, Kind.L), np.arange(len(program.offload.stage))),
    ):
        places = np.flatnonzero(np.isin(side.kind, kinds))
        for row in np.flatnonzero(awaited >= 0).tolist() if shown else ():
            found[row].append(int(places[entry[awaited[row]]]))
    return found
