"""Simulate: predict one step of a schedule from its stages' costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.action import Kind
from ppsim.costs import StageCost
from ppsim.engines import run_engine
from ppsim.memory import activation_levels
from ppsim.network import Network
from ppsim.program import Program
from ppsim.schedule import Schedule
from ppsim.trace import Trace


def simulate(
    schedule: Schedule,
    stages: Sequence[StageCost],
    *,
    network: Network | None = None,
    engine: str = "simpy",
    overlap: float = 1.0,
) -> Trace:
    """Predict one step.

    stages: the cost of each stage for one microbatch. network: links between ranks; None makes messages free.
    engine: "simpy", or "compiled" for the same answer sooner. overlap: an overlapped pair takes this share of the sum
    of its parts.

    The model: a rank runs its order in sequence, one action at a time; an action starts when its rank is free and its
    inputs have arrived. Nobody waits in a send. A transfer starts when its producer has ended and the transfer before
    it has left the link, keeps the link for bytes / bytes_per_s and arrives latency_s later. Stages on one rank hand
    over for nothing. Memory: see `ppsim.memory`.

    Raises ScheduleError if the schedule is incomplete or could hang, ValueError if costs and stages do not match.
    """
    if len(stages) != schedule.stages:
        raise ValueError(f"{len(stages)} stage costs for a schedule of {schedule.stages} stages: give one for each")
    if not (np.isfinite(overlap) and overlap > 0):
        raise ValueError(f"overlap must be a finite number > 0, got {overlap!r}")
    schedule.check()
    program = schedule.program
    network = Network() if network is None else network
    durations = row_durations(program, stages, overlap=overlap)
    sizes = message_bytes(program, stages)
    times = run_engine(engine, program, durations, sizes, network)
    if not (np.isfinite(times.end_s).all() and np.isfinite(times.message_arrival_s).all()):
        raise ValueError("the step takes longer than a float holds: give smaller costs, or a higher bytes_per_s")
    return Trace(
        program=program,
        clock="simulated",
        start_s=times.start_s,
        end_s=times.end_s,
        activation_bytes=activation_levels(program, stages),
        message_bytes=sizes,
        message_start_s=times.message_start_s,
        message_left_s=times.message_left_s,
        message_arrival_s=times.message_arrival_s,
        details={
            "engine": engine,
            "overlap": overlap,
            "latency_s": network.latency_s,
            "bytes_per_s": network.bytes_per_s if np.isfinite(network.bytes_per_s) else None,
            "links": len(network.links),
        },
    )


def row_durations(program: Program, stages: Sequence[StageCost], *, overlap: float = 1.0) -> npt.NDArray[np.float64]:
    """Seconds of each row, shape (rows,); the parts of an overlapped pair are scaled by `overlap`."""
    table = np.empty((4, len(stages)))
    table[Kind.F] = [stage.forward_s for stage in stages]
    table[Kind.B] = [stage.full_backward_s for stage in stages]
    table[Kind.I] = [stage.backward_input_s for stage in stages]
    table[Kind.W] = [stage.backward_weight_s for stage in stages]
    durations = table[program.kind, program.stage]
    in_pair = np.diff(program.action_start)[program.row_action] == 2
    return np.where(in_pair, durations * overlap, durations)


def message_bytes(program: Program, stages: Sequence[StageCost]) -> npt.NDArray[np.int64]:
    """Bytes of each message, shape (messages,): between s and s + 1 `output_bytes` of stage s, in both directions."""
    output = np.array([stage.output_bytes for stage in stages], np.int64)
    messages = program.messages
    return output[np.minimum(program.stage[messages.producer], program.stage[messages.consumer])]
