"""The compiled engine: the same times as SimPy's to the last bit, by one pass over the program in machine code."""

from __future__ import annotations

import numba
import numpy as np

from ppsim.simulation.engines.times import Times
from ppsim.simulation.timed_program import Load


def run_compiled(load: Load) -> Times:
    """Run a program that can end; seconds from the step's start. Compiled once per machine, then cached.

    Raises ValueError for shared devices, whose queues only SimPy's clock has.
    """
    if load.devices is not None:
        raise ValueError("the compiled engine has no shared devices (cores, devices): use engine='simpy'")
    program, messages = load.program, load.program.messages
    start_s = np.empty(len(load.duration_s))
    journeys_s = np.empty((len(messages), 2))
    run_pass(
        program.execution_order,
        program.action_start,
        program.rank,
        program.message_in,
        program.message_out,
        load.duration_s,
        load.dispatch_s,
        load.send_s,
        messages.link,
        load.occupied_s,
        load.latency_s,
        *load.receives(),
        np.zeros(program.ranks),
        np.zeros(len(program.links())),
        start_s,
        journeys_s,
    )
    message_start_s = np.ascontiguousarray(journeys_s[:, 0])
    return Times(
        start_s=start_s,
        end_s=start_s + load.duration_s,
        message_start_s=message_start_s,
        message_left_s=message_start_s + load.occupied_s,
        message_arrival_s=np.ascontiguousarray(journeys_s[:, 1]),
    )


@numba.njit(cache=True, nogil=True)
def run_pass(
    order,
    action_start,
    rank_of,
    message_in,
    message_out,
    duration,
    dispatch,
    send,
    link_of,
    occupied,
    latency,
    posts,
    posted,
    free,
    link_free,
    start,
    journeys,
):
    """Every action in an order in which what it needs has come before: the longest path through the step.

    Each float is computed as the SimPy engine computes it; a link has one sender, so no other order of the actions
    could change one. journeys: begun and arrived, side by side, as both are written at once. With a window a transfer
    begins when both its producer has ended and its receive is posted, whichever comes second.
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
        if windowed:
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


@numba.njit(cache=True, nogil=True, inline="always")
def _transfer(message, ready, link_of, occupied, latency, link_free, journeys):
    """Put a message on its link, which serves first in, first out."""
    link = link_of[message]
    begun = link_free[link]
    if ready > begun:
        begun = ready
    journeys[message, 0] = begun
    left = begun + occupied[message]
    link_free[link] = left
    journeys[message, 1] = left + latency[message]
