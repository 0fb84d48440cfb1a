"""The compiled engine: the same times as SimPy's to the last bit, by one pass over the program in machine code."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from ppsim.engines.times import Times
from ppsim.network import Network
from ppsim.program import Program


def run_compiled(
    program: Program, durations_s: npt.NDArray[np.float64], message_bytes: npt.NDArray[np.int64], network: Network
) -> Times:
    """Run a program that passed the check; seconds from the step's start. Compiled once per machine, then cached."""
    messages = program.messages
    links = program.links()
    link = message_links(program)
    models = [network.link(*pair) for pair in links]
    rate = np.array([model.bytes_per_s for model in models], np.float64)
    latency_s = np.array([model.latency_s for model in models], np.float64)
    occupied_s = message_bytes / rate[link] if len(messages) else np.zeros(0)
    start_s, end_s = np.empty(len(durations_s)), np.empty(len(durations_s))
    begun_s, left_s, arrival_s = np.empty(len(messages)), np.empty(len(messages)), np.empty(len(messages))
    _advance(
        program.rank_actions,
        program.action_start,
        program.message_in,
        program.message_out,
        messages.destination,
        durations_s,
        link,
        occupied_s,
        latency_s[link] if len(messages) else np.zeros(0),
        np.zeros(len(links)),
        start_s,
        end_s,
        begun_s,
        left_s,
        arrival_s,
    )
    return Times(
        start_s=start_s, end_s=end_s, message_start_s=begun_s, message_left_s=left_s, message_arrival_s=arrival_s
    )


def message_links(program: Program) -> npt.NDArray[np.int64]:
    """The index of each message's link in `program.links()`, shape (messages,)."""
    is_first = program.messages.position == 0  # the table is ordered by link and starts each at position 0
    return np.cumsum(is_first) - 1


@numba.njit(cache=True, nogil=True)
def _advance(
    rank_actions,
    action_start,
    message_in,
    message_out,
    destination,
    durations,
    link,
    occupied,
    latency,
    link_free,
    start,
    end,
    begun,
    left,
    arrival,
):
    """Run each rank as far as its messages have arrived, then whoever was waiting for what it has sent.

    Every float is computed as the SimPy engine computes it: an order's times depend on nothing but the arrivals, and
    a link has one sender, so the sequence in which ranks are advanced does not matter.
    """
    ranks = len(rank_actions) - 1
    position = rank_actions[:-1].copy()
    free = np.zeros(ranks)
    awaited = np.full(ranks, -1)  # the message that holds a rank
    ready = np.arange(ranks)[::-1].copy()
    count = ranks
    arrival[:] = np.nan
    while count:
        count -= 1
        rank = ready[count]
        now = free[rank]
        action = position[rank]
        last = rank_actions[rank + 1]
        awaited[rank] = -1
        while action < last:
            first_row, end_row = action_start[action], action_start[action + 1]
            begin = now
            missing = -1
            for row in range(first_row, end_row):
                message = message_in[row]
                if message >= 0:
                    there = arrival[message]
                    if np.isnan(there):
                        missing = message
                        break
                    begin = max(begin, there)
            if missing >= 0:
                awaited[rank] = missing
                break
            for row in range(first_row, end_row):
                start[row] = begin
                begin = begin + durations[row]
                end[row] = begin
            now = begin
            for row in range(first_row, end_row):
                message = message_out[row]
                if message >= 0:
                    lane = link[message]
                    leaves = max(now, link_free[lane])
                    begun[message] = leaves
                    leaves = leaves + occupied[message]
                    left[message] = leaves
                    link_free[lane] = leaves
                    arrival[message] = leaves + latency[message]
                    receiver = destination[message]
                    if awaited[receiver] == message:
                        awaited[receiver] = -1
                        ready[count] = receiver
                        count += 1
            action += 1
        position[rank] = action
        free[rank] = now
