"""Pipeline times: when the ranks of many steps end that run the same schedule with different costs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.named.registry import build_schedule
from ppsim.schedule.program import Program
from ppsim.simulation.timed_program import TimedProgram

Seconds = npt.NDArray[np.float64]
_BLOCK_NUMBERS = 4_000_000  # of durations at a time: 32 MB


@lru_cache(maxsize=256)
def pipeline_program(schedule: str, ranks: int, microbatches: int, stages_per_rank: int) -> Program:
    """A schedule's program, kept for the next steps that run it."""
    built = build_schedule(schedule, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank)
    program = built.program
    program.execution_order  # noqa: B018  (finding it is the check)
    return program


@lru_cache(maxsize=64)
def splits_backward(schedule: str) -> bool:
    """Whether a named schedule computes I and W apart."""
    built = build_schedule(schedule, ranks=2, microbatches=8)
    return any(bool(np.isin(order.kind, (Kind.I, Kind.W)).any()) for order in built.orders)


def pipeline_ends(program: Program, seconds: Seconds, occupied_s: Seconds, latency_s: Seconds) -> Seconds:
    """When each rank of each step ends, from the first start.

    Parameters
    ----------
    program : Program
        Of the schedule.
    seconds : array of shape (4, n, stages)
        Of F, B, I and W, the numbers of `Kind`, in each of n steps.
    occupied_s, latency_s : arrays of shape (n, p, p)
        What a message takes from rank to rank in each step.

    Returns
    -------
    array of shape (n, p)
        The same as `simulate` gives for each step alone.
    """
    from ppsim.simulation.engines.batched_engine import run_batched  # numba loads for a second, and only here

    count, messages = seconds.shape[1], program.messages
    ends = np.empty((count, program.ranks))
    block = max(1, _BLOCK_NUMBERS // max(len(program.stage), 1))
    timed = _untimed(program)
    for first in range(0, count, block):
        part = slice(first, min(first + block, count))
        durations = seconds[program.kind[:, None], np.arange(part.start, part.stop)[None, :], program.stage[:, None]].T
        times = run_batched(
            timed,
            np.ascontiguousarray(durations),
            np.zeros((1, program.actions)),
            np.ascontiguousarray(occupied_s[part, messages.source, messages.destination]),
            np.ascontiguousarray(latency_s[part, messages.source, messages.destination]),
            watched=np.zeros(0, np.int64),
        )
        ends[part] = times.last_end_s - times.first_start_s.min(axis=1)[:, None]
    return ends


def _untimed(program: Program) -> TimedProgram:
    """The program without times, which each sample brings."""
    messages = len(program.messages)
    return TimedProgram(
        program=program,
        duration_s=np.zeros(len(program.stage)),
        message_bytes=np.zeros(messages, np.int64),
        dispatch_s=np.zeros(program.actions),
        send_s=np.zeros(program.actions),
        occupied_s=np.zeros(messages),
        latency_s=np.zeros(messages),
    )
