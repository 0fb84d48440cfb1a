"""The compiled engine: the same bits as the SimPy engine, by one pass over the program in machine code."""

from __future__ import annotations

from functools import partial

import numpy as np

from ppsim.errors import InputError
from ppsim.kernel_cache import kernel
from ppsim.schedule.program_tables import Integers
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
    run_pass(
        program.execution_order,
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
    )


def refuse_devices(timed: TimedProgram) -> None:
    """Raise InputError for shared devices: when their queues move is known only while a clock runs."""
    if timed.devices is not None:
        raise InputError("the compiled engine has no shared devices (cores, devices, speeds): use engine='simpy'")


@kernel
def run_pass(
    order: Integers,
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
        The actions, each after all that it needs.
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
