"""The compiled engine: the same bits as the SimPy engine, by one pass over the program in machine code."""

from __future__ import annotations

from functools import partial

import numpy as np

from ppsim.errors import InputError
from ppsim.kernel_cache import kernel, kernel_part
from ppsim.schedule.program_tables import Integers
from ppsim.schedule.side_table import STREAMS, SideTable
from ppsim.schedule.streams import MessageGraph
from ppsim.simulation.engines.times import Seconds, StepTimes
from ppsim.simulation.timed_program import TimedProgram


def run_compiled(timed: TimedProgram) -> StepTimes:
    """Run a program that can end.

    Parameters
    ----------
    timed : TimedProgram
        What is run.

    Returns
    -------
    StepTimes
        Seconds from the step's start.

    Raises
    ------
    InputError
        For shared devices.
    """
    refuse_devices(timed)
    program, messages = timed.program, timed.program.messages
    start_s = np.empty(len(timed.duration_s))
    journeys_s = np.empty((len(messages), 2))
    side_start_s = np.zeros(len(timed.side_s))
    run_step(
        execution_order(timed),
        timed.graph or MessageGraph.none(),
        timed.side,
        timed.side_s,
        side_start_s,
        program.action_start,
        program.rank,
        program.message_in,
        program.message_out,
        timed.duration_s,
        timed.dispatch_s,
        timed.send_s,
        messages.link,
        timed.occupied_s,
        timed.latency_s,
        *timed.receives(),
        np.zeros(program.ranks),
        np.zeros(len(program.links())),
        start_s,
        journeys_s,
    )
    message_start_s = np.ascontiguousarray(journeys_s[:, 0])
    return StepTimes(
        start_s=start_s,
        end_s=start_s + timed.duration_s,
        message_start_s=message_start_s,
        message_left_s=message_start_s + timed.occupied_s,
        message_arrival_s=np.ascontiguousarray(journeys_s[:, 1]),
        **StepTimes.beside(timed, side_start_s),
    )


def execution_order(timed: TimedProgram) -> Integers:
    """The sequence in which actions can run; empty where that of a graph is taken."""
    return timed.program.execution_order if timed.graph is None else np.zeros(0, np.int32)


def refuse_devices(timed: TimedProgram) -> None:
    """Raise InputError for shared devices: when their queues move is known only while a clock runs."""
    if timed.devices is not None:
        raise InputError("the compiled engine has no shared devices (cores, devices, speeds): use engine='simpy'")


@kernel
def run_step(
    order: Integers,
    graph: MessageGraph,
    side: SideTable,
    side_taken: Seconds,
    side_start: Seconds,
    action_start: Integers,
    rank_of: Integers,
    message_in: Integers,
    message_out: Integers,
    duration: Seconds,
    dispatch: Seconds,
    send: Seconds,
    link_of: Integers,
    occupied: Seconds,
    latency: Seconds,
    posts: Integers,
    posted: Seconds,
    free: Seconds,
    link_free: Seconds,
    start: Seconds,
    journeys: Seconds,
) -> None:
    """Find the longest path through the step.

    Parameters
    ----------
    order : (actions,)
        The actions, each after all that it needs; empty where the graph says.
    graph
        What messages wait for; of no messages where they leave as they are made. Needed where something runs beside.
    side, side_taken : , (entries,)
        What runs beside computations, and its seconds.
    side_start : (entries,)
        Filled in: when each entry starts.
    action_start, rank_of, message_in, message_out, link_of
        As `action_start`, `rank`, `message_in`, `message_out` of `Program` and `link` of its messages.
    duration, dispatch, send, occupied, latency
        Seconds, as of `TimedProgram`.
    posts, posted
        As of `TimedProgram.receives`. `posted` is overwritten.
    free, link_free : (p,), (links,)
        When each rank and link is free: zeros, overwritten.
    start : (rows,)
        Filled in: when each row starts.
    journeys : (messages, 2)
        Filled in: when each message's transfer begins, and when it arrives.

    Notes
    -----
    Each float is the sum that the SimPy engine computes. A link has one sender, so another order of the actions gives
    the same floats.
    """
    if len(graph.order):
        _run_graph(
            graph,
            side,
            side_taken,
            side_start,
            action_start,
            rank_of,
            message_in,
            duration,
            dispatch,
            send,
            occupied,
            latency,
            free,
            start,
            journeys,
        )
        return
    windowed = len(posted) > 0
    produced = np.full(len(posted), np.nan)
    for action in order:
        first, last = action_start[action], action_start[action + 1]
        rank = rank_of[first]
        begin = free[rank]
        for row in range(first, last):
            message = message_in[row]
            if message >= 0:
                there = journeys[message, 1]
                if there > begin:
                    begin = there
        if windowed:  # using a message posts a later receive; its transfer begins if its producer has ended
            for row in range(first, last):
                message = message_in[row]
                if message >= 0 and posts[message] >= 0:
                    freed = posts[message]
                    posted[freed] = begin
                    if not np.isnan(produced[freed]):
                        _transfer(freed, max(produced[freed], begin), link_of, occupied, latency, link_free, journeys)
        begin = begin + dispatch[action]
        for row in range(first, last):
            start[row] = begin
            begin = begin + duration[row]
        begin = begin + send[action]
        free[rank] = begin
        for row in range(first, last):
            message = message_out[row]
            if message >= 0:
                if windowed:
                    produced[message] = begin
                    if np.isnan(posted[message]):
                        continue
                    _transfer(message, max(begin, posted[message]), link_of, occupied, latency, link_free, journeys)
                else:
                    _transfer(message, begin, link_of, occupied, latency, link_free, journeys)


@kernel
def _run_graph(
    graph: MessageGraph,
    side: SideTable,
    side_taken: Seconds,
    side_start: Seconds,
    action_start: Integers,
    rank_of: Integers,
    message_in: Integers,
    duration: Seconds,
    dispatch: Seconds,
    send: Seconds,
    occupied: Seconds,
    latency: Seconds,
    free: Seconds,
    start: Seconds,
    journeys: Seconds,
) -> None:
    """Find the longest path through a step whose messages wait for one another; as `run_step`."""
    actions = len(action_start) - 1
    done = np.zeros(actions + 1)  # when each action's rank goes on; the last stands for -1, before the step
    left = np.zeros(len(occupied) + 1)  # when each message has left; likewise
    has_side = len(side_taken) > 0
    stream_free = np.zeros(STREAMS * len(free))
    for node in graph.order:
        if node < actions:
            first, last = action_start[node], action_start[node + 1]
            rank = rank_of[first]
            now = free[rank]
            if has_side:
                now = _start_beside(side, side_taken, side_start, stream_free, node, now)
            for row in range(first, last):
                message = message_in[row]
                if message >= 0 and journeys[message, 1] > now:
                    now = journeys[message, 1]
                if has_side:
                    for entry in (side.gather[row], side.load[row]):
                        if entry >= 0:
                            now = max(now, side_start[entry] + side_taken[entry])
            now = now + dispatch[node]
            for row in range(first, last):
                start[row] = now
                now = now + duration[row]
            now = now + send[node]
            free[rank] = done[node] = now
            continue
        message = node - actions
        now = max(done[graph.send_after[message]], done[graph.receive_after[message]])
        now = max(now, left[graph.ahead_sending[message]], left[graph.ahead_receiving[message]])
        journeys[message, 0] = now
        left[message] = now + occupied[message]
        journeys[message, 1] = left[message] + latency[message]
    if has_side:
        for rank in range(len(free)):
            _start_beside(side, side_taken, side_start, stream_free, actions + rank, free[rank])


@kernel_part
def _start_beside(
    side: SideTable,
    side_taken: Seconds,
    side_start: Seconds,
    stream_free: Seconds,
    place: int,
    now: float,
) -> float:
    """Put what stands at a place of a rank's order on its streams; gives the moment at which the rank goes on."""
    for entry in range(side.before[place, 0], side.before[place, 1]):
        stream, out = side.stream[entry], side.after[entry]
        begun = max(now, stream_free[stream])
        if out >= 0:
            begun = max(begun, side_start[out] + side_taken[out])
        side_start[entry] = begun
        stream_free[stream] = begun + side_taken[entry]
        if side.blocks[entry]:
            now = stream_free[stream]
    return now


@partial(kernel, inline="always")
def _transfer(
    message: int,
    ready: float,
    link_of: Integers,
    occupied: Seconds,
    latency: Seconds,
    link_free: Seconds,
    journeys: Seconds,
) -> None:
    """Put a message on its link, which serves first in, first out."""
    link = link_of[message]
    begun = link_free[link]
    if ready > begun:
        begun = ready
    journeys[message, 0] = begun
    left = begun + occupied[message]
    link_free[link] = left
    journeys[message, 1] = left + latency[message]
