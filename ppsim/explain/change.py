"""Change: how much of the difference between two steps' lengths each single delay explains."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import EdgeTimes, replay
from ppsim.explain.wiring import Wiring

Seconds = npt.NDArray[np.float64]
Shares = npt.NDArray[np.float64]

# As shares of the step. A path's length is a sum of some thousand floats, so that equal lengths differ by rounding.
_TIE = 1e-12  # paths that differ by less are equally long
_CLOSE = 1e-11  # a line that is nearer to the step's length has reached it

_MOST_REPLAYS = 200  # two steps of a thousand actions need some dozens


@dataclass(frozen=True, kw_only=True)
class Change:
    """What each delay adds to the difference between two steps' lengths; negative where it takes away.

    Parameters
    ----------
    compute_s, device_s : arrays of shape (actions,)
        Seconds that durations explain, and that starts after everything was there explain.
    message_s : array of shape (messages,)
        Seconds that messages explain.
    unexplained_s : float
        What is missing to the difference. It is rounding.
    replays : int
        How often a step was replayed. Where the limit was reached, the sum still holds, and its parts nearly.
    """

    compute_s: Seconds
    device_s: Seconds
    message_s: Seconds
    unexplained_s: float
    replays: int


class PathWeights(NamedTuple):
    """The share of a path that crosses each action, each message on its link, and each message's latency.

    A share is 0 or 1, or between where several paths are equally long. A message that queues waits for the link of the
    one ahead, not for its latency.
    """

    action: Shares
    link: Shares
    latency: Shares

    @classmethod
    def zeros(cls, wiring: Wiring) -> PathWeights:
        actions, messages = len(wiring.rank), len(wiring.producer)
        return cls(np.zeros(actions), np.zeros(messages), np.zeros(messages))

    def add(self, other: PathWeights, width: float) -> None:
        """Add `width` times the other's."""
        for mine, its in zip(self, other, strict=True):
            np.add(mine, width * its, out=mine)


class _Line(NamedTuple):
    """The length of one path as all edge times move. It is the step's length at `share`, and nowhere above it."""

    share: float
    length_s: float
    slope_s: float
    weights: PathWeights

    def at(self, share: float) -> float:
        """The path's length at another share."""
        return self.length_s + (share - self.share) * self.slope_s


def explain_change(wiring: Wiring, before: EdgeTimes, after: EdgeTimes) -> Change:
    """Deal the difference between two steps' lengths to the edge times that changed.

    Parameters
    ----------
    wiring : Wiring
        What waits for what in both steps.
    before, after : EdgeTimes
        Those of the first and of the second step.

    Returns
    -------
    Change

    Notes
    -----
    These are the prices of Aumann and Shapley (Values of Non-Atomic Games, 1974) for the longest path. All edge times
    move together, in a straight line, from the first step's to the second's. An edge's change counts for as long as
    the edge is on the critical path, so the result does not depend on an order of the changes.

    The step's length on the way is the largest of the lengths of all paths, each of which changes linearly. So it is
    convex and made of straight pieces. These are found exactly: where the lines of two known paths cross, the step is
    replayed, until no longer path appears.
    """
    way = _Way(wiring, before, after)
    first, last = way.walk()
    moved, weights = way.moved, way.weights
    compute_s, device_s = weights.action * moved.compute_s, weights.action * moved.device_s
    message_s = weights.link * (moved.post_s + moved.occupied_s) + weights.latency * moved.latency_s
    explained = float(compute_s.sum() + device_s.sum() + message_s.sum())
    return Change(
        compute_s=compute_s,
        device_s=device_s,
        message_s=message_s,
        unexplained_s=last.length_s - first.length_s - explained,
        replays=way.replays,
    )


class _Way:
    """The way from one step's edge times to another's, in shares from 0 to 1, and the critical paths on it.

    `weights` holds the mean over the way of the critical path's weights, once `walk` is done.
    """

    def __init__(self, wiring: Wiring, before: EdgeTimes, after: EdgeTimes) -> None:
        self.wiring, self.before, self.after = wiring, before, after
        self.moved = EdgeTimes(*(new - old for old, new in zip(before, after, strict=True)))
        self.weights = PathWeights.zeros(wiring)
        self.replays = 0
        # Spans of the way whose critical paths are not known yet, by how much is in doubt; see `_count_or_keep`.
        self._spans: list[tuple[float, int, _Line, _Line]] = []
        self._spans_made = 0
        self._close_s = 0.0

    def walk(self) -> tuple[_Line, _Line]:
        """Find the critical paths of the whole way, and return the lines of both ends."""
        first, last = self._line_at(0.0), self._line_at(1.0)
        self._close_s = _CLOSE * max(first.length_s, last.length_s)
        self._count_or_keep(first, last)
        while self._spans:
            _, _, left, right = heapq.heappop(self._spans)
            share = _crossing(left, right)
            if self.replays < _MOST_REPLAYS:
                found = self._line_at(share)
                if found.length_s > left.at(share) + self._close_s:  # another path is longer than both here
                    self._count_or_keep(left, found)
                    self._count_or_keep(found, right)
                    continue
            self.weights.add(left.weights, share - left.share)
            self.weights.add(right.weights, right.share - share)
        return first, last

    def _line_at(self, share: float) -> _Line:
        """The line of the critical path at a share."""
        from ppsim.explain import kernels  # imported here because numba takes a second to import

        self.replays += 1
        edge_times = self.before if share == 0 else self.after if share == 1 else self.before.towards(self.after, share)
        times, weights = replay(self.wiring, edge_times), PathWeights.zeros(self.wiring)
        length_s = float(times.end_s.max())
        kernels.trace_back(self.wiring, times, _TIE * length_s, weights)
        moved = self.moved
        slope_s = sum(
            float((weight * change).sum())  # not by @: its threads take longer than the sum
            for weight, change in (
                (weights.action, moved.compute_s + moved.device_s),
                (weights.link, moved.post_s + moved.occupied_s),
                (weights.latency, moved.latency_s),
            )
        )
        return _Line(share, length_s, slope_s, weights)

    def _count_or_keep(self, left: _Line, right: _Line) -> None:
        """Count the span between two lines if one of them is critical on all of it, else keep it to be looked into.

        On the span the step's length is at least that of both lines, and at most the chord between its ends. The span
        where these are furthest apart comes first, so that replays, should they be too few, are spent where they tell
        most.
        """
        width = right.share - left.share
        if left.at(right.share) >= right.length_s - self._close_s:
            self.weights.add(left.weights, width)
        elif right.at(left.share) >= left.length_s - self._close_s:
            self.weights.add(right.weights, width)
        else:
            share = _crossing(left, right)
            chord_s = left.length_s + (right.length_s - left.length_s) * (share - left.share) / width
            doubt = (chord_s - max(left.at(share), right.at(share))) * width
            self._spans_made += 1  # tells spans of equal doubt apart, since lines have no order
            heapq.heappush(self._spans, (-doubt, self._spans_made, left, right))


def _crossing(left: _Line, right: _Line) -> float:
    """The share between theirs at which both lines are equally long."""
    steeper = right.slope_s - left.slope_s
    middle = (left.share + right.share) / 2
    crossing = left.share + (left.length_s - right.at(left.share)) / steeper if steeper > 0 else middle
    return min(max(crossing, left.share), right.share)
