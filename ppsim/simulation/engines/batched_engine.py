"""The batched engine: one program under many samples of its times, in one call and without their traces."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from ppsim.simulation.engines.compiled_engine import run_pass
from ppsim.simulation.engines.samples import Samples
from ppsim.simulation.timed_program import Load

Seconds = npt.NDArray[np.float64]


def run_batched(
    load: Load,
    duration_s: Seconds,
    dispatch_s: Seconds,
    occupied_s: Seconds,
    latency_s: Seconds,
    *,
    watched: npt.NDArray[np.integer],
    with_starts: bool = False,
) -> Samples:
    """Run every sample; to the last bit the times that `run_compiled` has for a load with these durations.

    duration_s: shape (n, rows). dispatch_s: shape (n, actions), occupied_s, latency_s: shape (n, messages); or one row
    where all samples share it. They stand for those of the load, which has the rest. watched: rows whose ends are kept.
    The Python lock is not held: threads may run one block of samples each, with buffers as large as one step each.
    Raises ValueError for shared devices, as `run_compiled` does.
    """
    if load.devices is not None:
        raise ValueError("the compiled engine has no shared devices (cores, devices): use engine='simpy'")
    program, messages = load.program, load.program.messages
    count = len(duration_s)
    samples = Samples(
        first_start_s=np.empty((count, program.ranks)),
        last_end_s=np.empty((count, program.ranks)),
        compute_s=np.zeros((count, program.ranks)),
        watched_end_s=np.empty((count, len(watched))),
        start_s=np.empty((count if with_starts else 0, len(program.stage))),
    )
    _run_samples(
        program.execution_order,
        program.action_start,
        program.rank,
        program.message_in,
        program.message_out,
        duration_s,
        dispatch_s,
        load.send_s,
        messages.link,
        occupied_s,
        latency_s,
        *load.receives(),
        np.zeros(len(program.links())),
        program.action_start[program.rank_actions],
        np.asarray(watched, np.int64),
        samples.first_start_s,
        samples.last_end_s,
        samples.compute_s,
        samples.watched_end_s,
        samples.start_s,
    )
    return samples


@numba.njit(cache=True, nogil=True)
def _run_samples(
    order,
    action_start,
    rank_of,
    message_in,
    message_out,
    durations,
    dispatch,
    send,
    link_of,
    occupied,
    latency,
    posts,
    posted,
    link_free,
    rank_rows,
    watched,
    first_start,
    last_end,
    compute,
    watched_end,
    starts,
):
    ranks = len(rank_rows) - 1
    free = np.empty(ranks)
    receives = np.empty(len(posted))
    start = np.empty(len(rank_of))
    journeys = np.empty((len(link_of), 2))
    for k in range(len(durations)):
        duration = durations[k]
        free[:] = 0.0
        link_free[:] = 0.0
        receives[:] = posted
        run_pass(
            order,
            action_start,
            rank_of,
            message_in,
            message_out,
            duration,
            dispatch[min(k, len(dispatch) - 1)],
            send,
            link_of,
            occupied[min(k, len(occupied) - 1)],
            latency[min(k, len(latency) - 1)],
            posts,
            receives,
            free,
            link_free,
            start,
            journeys,
        )
        step_start = np.inf
        for rank in range(ranks):
            begin, end = rank_rows[rank], rank_rows[rank + 1]
            if begin < end:
                step_start = min(step_start, start[begin])
        for rank in range(ranks):
            begin, end = rank_rows[rank], rank_rows[rank + 1]
            if begin == end:
                first_start[k, rank] = last_end[k, rank] = step_start
                continue
            total = 0.0
            for row in range(begin, end):  # as the trace adds them up: ends minus starts, in order
                total += (start[row] + duration[row]) - start[row]
            compute[k, rank] = total
            first_start[k, rank] = start[begin]
            last_end[k, rank] = start[end - 1] + duration[end - 1]
        for index in range(len(watched)):
            watched_end[k, index] = start[watched[index]] + duration[watched[index]]
        if len(starts):
            starts[k] = start
