"""The batched engine: many samples of one step in one call, without their traces."""

from __future__ import annotations

import numpy as np

from ppsim.kernel_cache import kernel
from ppsim.schedule.action import Kind
from ppsim.schedule.program_tables import Integers
from ppsim.schedule.side_table import SideTable
from ppsim.schedule.streams import MessageGraph
from ppsim.simulation.engines.compiled_engine import execution_order, refuse_devices, run_step
from ppsim.simulation.engines.times import BatchTimes, Seconds
from ppsim.simulation.timed_program import TimedProgram

_REDUCE_GRAD = int(Kind.REDUCE_GRAD)


def run_batched(
    timed: TimedProgram,
    duration_s: Seconds,
    dispatch_s: Seconds,
    occupied_s: Seconds,
    latency_s: Seconds,
    *,
    watched: Integers,
    with_starts: bool = False,
) -> BatchTimes:
    """Run every sample.

    Parameters
    ----------
    timed : TimedProgram
        The program, and all that does not vary.
    duration_s : array of shape (n, rows)
        Seconds of each row in each sample, instead of those of `timed`. Likewise the three arrays below, which may have
        one row for all samples.
    dispatch_s : array of shape (n, actions) or (1, actions)
    occupied_s, latency_s : arrays of shape (n, messages) or (1, messages)
    watched : array of shape (watched,)
        Rows whose ends are kept.
    with_starts : bool
        Whether all starts are kept.

    Returns
    -------
    BatchTimes
        The same bits as `run_compiled` gives for each sample alone.

    Raises
    ------
    InputError
        For shared devices.

    Notes
    -----
    The Python lock is not held, so threads can run blocks of samples at the same time. Each needs buffers of one step.
    """
    refuse_devices(timed)
    program, messages = timed.program, timed.program.messages
    count = len(duration_s)
    times = BatchTimes(
        first_start_s=np.empty((count, program.ranks)),
        last_end_s=np.empty((count, program.ranks)),
        compute_s=np.zeros((count, program.ranks)),
        watched_end_s=np.empty((count, len(watched))),
        start_s=np.empty((count if with_starts else 0, len(program.stage))),
        reduced_s=np.full(count, -np.inf),
    )
    _run_samples(
        execution_order(timed),
        timed.graph or MessageGraph.none(),
        timed.side,
        timed.side_s,
        program.action_start,
        program.rank,
        program.message_in,
        program.message_out,
        duration_s,
        dispatch_s,
        timed.send_s,
        messages.link,
        occupied_s,
        latency_s,
        *timed.receives(),
        np.zeros(len(program.links())),
        program.action_start[program.rank_actions],
        np.asarray(watched, np.int64),
        times.first_start_s,
        times.last_end_s,
        times.compute_s,
        times.watched_end_s,
        times.start_s,
        times.reduced_s,
    )
    return times


@kernel
def _run_samples(
    order: Integers,
    graph: MessageGraph,
    side: SideTable,
    side_taken: Seconds,
    action_start: Integers,
    rank_of: Integers,
    message_in: Integers,
    message_out: Integers,
    durations: Seconds,
    dispatch: Seconds,
    send: Seconds,
    link_of: Integers,
    occupied: Seconds,
    latency: Seconds,
    posts: Integers,
    posted: Seconds,
    link_free: Seconds,
    rank_rows: Integers,
    watched: Integers,
    first_start: Seconds,
    last_end: Seconds,
    compute: Seconds,
    watched_end: Seconds,
    starts: Seconds,
    reduced: Seconds,
) -> None:
    """Run the samples one after another in the same buffers. Writes the last six arrays."""
    ranks = len(rank_rows) - 1
    free = np.empty(ranks)
    receives = np.empty(len(posted))
    start = np.empty(len(rank_of))
    journeys = np.empty((len(link_of), 2))
    side_start = np.zeros(len(side_taken))
    for k in range(len(durations)):
        duration = durations[k]
        free[:] = 0.0
        link_free[:] = 0.0
        receives[:] = posted
        run_step(
            order,
            graph,
            side,
            side_taken,
            side_start,
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
            for row in range(begin, end):  # the sum that the trace takes, in its order
                total += (start[row] + duration[row]) - start[row]
            compute[k, rank] = total
            first_start[k, rank] = start[begin]
            last_end[k, rank] = start[end - 1] + duration[end - 1]
        for index in range(len(watched)):
            watched_end[k, index] = start[watched[index]] + duration[watched[index]]
        if len(starts):
            starts[k] = start
        for entry in range(len(side_taken)):
            if side.kind[entry] == _REDUCE_GRAD:
                reduced[k] = max(reduced[k], side_start[entry] + side_taken[entry])
