"""Tables: a trace as columns, one row per computation and per end of a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ppsim.schedule.action import Kind

if TYPE_CHECKING:
    from ppsim.trace.trace import Trace


def frame_columns(trace: Trace) -> dict[str, Any]:
    """Columns of `Trace.to_frame`: computations in program order, then sends, then receives."""
    program, messages = trace.program, trace.program.messages
    names = np.array([kind.name for kind in Kind])
    is_forward = program.kind[messages.producer] == Kind.F
    sent, received = np.where(is_forward, Kind.SEND_F, Kind.SEND_B), np.where(is_forward, Kind.RECV_F, Kind.RECV_B)
    producer, consumer = messages.producer, messages.consumer
    columns = {
        "rank": np.concatenate([program.rank, messages.source, messages.destination]),
        "stage": np.concatenate([program.stage, program.stage[producer], program.stage[consumer]]),
        "kind": names[np.concatenate([program.kind, sent, received])],
        "microbatch": np.concatenate([program.microbatch, program.microbatch[producer], program.microbatch[consumer]]),
        "start_s": np.concatenate([trace.start_s, trace.message_start_s, trace.message_start_s]),
        "end_s": np.concatenate([trace.end_s, trace.message_left_s, trace.message_arrival_s]),
        "size_bytes": np.concatenate([trace.activation_bytes, trace.message_bytes, trace.message_bytes]),
    }
    return columns if trace.reduce_start_s is None else _with_reductions(columns, trace)


def _with_reductions(columns: dict[str, Any], trace: Trace) -> dict[str, Any]:
    stages = np.arange(trace.schedule.stages)
    more = {
        "rank": np.asarray(trace.schedule.placement),
        "stage": stages,
        "kind": np.full(len(stages), Kind.REDUCE_GRAD.name),
        "microbatch": np.full(len(stages), -1),
        "start_s": trace.reduce_start_s,
        "end_s": trace.reduce_end_s,
        "size_bytes": trace.reduce_bytes,
    }
    return {name: np.concatenate([column, more[name]]) for name, column in columns.items()}
