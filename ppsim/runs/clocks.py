"""Clocks: what to add to each rank's times so that no action starts before its input was made."""

from __future__ import annotations

import heapq
import math

import numpy as np
import numpy.typing as npt

from ppsim.schedule.program import Program

Seconds = npt.NDArray[np.float64]


def clock_offsets(program: Program, start_s: Seconds, end_s: Seconds, *, keep: bool = False) -> Seconds:
    """Align the ranks' clocks by the messages between them.

    Parameters
    ----------
    program : Program
        What ran.
    start_s, end_s : arrays of shape (rows,)
        When each row ran, on its rank's clock.
    keep : bool
        Leave the clocks of ranks between which nothing starts before its input was made.

    Returns
    -------
    array of shape (p,)
        Seconds to add to each rank's times; 0 for the first rank.

    Notes
    -----
    A message from a to b shows that clock b is at most so far behind clock a. Messages in both directions leave an
    interval, whose middle is taken: the fastest message then takes as long one way as the other (Cristian 1989). With
    messages one way only, the fastest is taken to take no time. Ranks that exchange no message are reached over
    others, along the pairs with the shortest intervals.
    """
    messages = program.messages
    bounds = np.full(
        (program.ranks, program.ranks), np.inf
    )  # [a, b]: the least b's start is after a's end, uncorrected
    np.minimum.at(
        bounds, (messages.source, messages.destination), start_s[messages.consumer] - end_s[messages.producer]
    )
    offsets_s = np.zeros(program.ranks)
    reached: set[int] = set()
    for root in range(program.ranks):
        if root in reached:
            continue
        waiting = [(0.0, root, 0.0)]
        while waiting:
            _, rank, offset_s = heapq.heappop(waiting)
            if rank in reached:
                continue
            reached.add(rank)
            offsets_s[rank] = offset_s
            for other in range(program.ranks):
                width_s = bounds[rank, other] + bounds[other, rank]
                if other not in reached and min(bounds[rank, other], bounds[other, rank]) < math.inf:
                    behind_s = _behind(float(bounds[rank, other]), float(bounds[other, rank]), keep=keep)
                    heapq.heappush(waiting, (float(width_s), other, offset_s + behind_s))
    return offsets_s


def _behind(there_s: float, back_s: float, *, keep: bool) -> float:
    """By how much the other's clock is behind: no less than -there_s, no more than back_s."""
    if keep and there_s >= 0 and back_s >= 0:
        return 0.0
    if math.isinf(there_s) or math.isinf(back_s):
        return back_s if math.isinf(there_s) else -there_s
    return (back_s - there_s) / 2
