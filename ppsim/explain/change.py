"""Change: how much of the difference between two steps' lengths each single delay explains."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import DELAYS, Delays, Times, Wiring, replay

Seconds = npt.NDArray[np.float64]
_TIE = 1e-12  # of the step: paths that differ by less are equally long
_MOST_STEPS = 200  # replays


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A path's length as the delays move from one step to the other: exact at `share`, and never above the step's.

    *_weight: the share of the path (of the paths, where several are equally long) that crosses
    each action, each message's time on its link, and each message's latency (a message that queues waits for the link
    of the one ahead, not for its latency).
    """

    share: float
    length_s: float
    slope_s: float
    action_weight: Seconds
    link_weight: Seconds
    latency_weight: Seconds

    def at(self, share: float) -> float:
        """The path's length at another share."""
        return self.length_s + (share - self.share) * self.slope_s


@dataclass(frozen=True, kw_only=True)
class Change:
    """Seconds of the difference that each delay explains: (actions,) and (messages,), signed; and the rest.

    They add up to the difference of the two steps' lengths; unexplained_s is rounding. Should replays be too few, the
    sum holds still, but what it is dealt to is nearly right only.
    """

    compute_s: Seconds
    device_s: Seconds
    message_s: Seconds
    unexplained_s: float
    replays: int


def explain_change(wiring: Wiring, before: Delays, after: Delays) -> Change:
    """Aumann and Shapley's prices (Values of Non-Atomic Games, 1974) of the delays, for the longest path.

    All delays move together, in a straight line, from the first step's to the second's; a change of a delay counts
    while it is on the critical path. The path's length is convex and made of straight pieces on the way, so these are
    found exactly: where two paths cross, the step is replayed until no longer one appears.
    """
    moved = {name: getattr(after, name) - getattr(before, name) for name in DELAYS}
    link_moved = moved["post_s"] + moved["occupied_s"]
    action_moved = moved["compute_s"] + moved["device_s"]
    replays = 0

    def line_at(share: float) -> _Line:
        nonlocal replays
        replays += 1
        delays = before if share == 0 else after if share == 1 else before.towards(after, share)
        times = replay(wiring, delays)
        weights = _flow(wiring, times)
        slope = sum(
            float((weight * change).sum())  # not by @: its threads take longer than the sum
            for weight, change in zip(weights, (action_moved, link_moved, moved["latency_s"]), strict=True)
        )
        return _Line(
            share=share,
            length_s=float(times.end_s.max()),
            slope_s=slope,
            action_weight=weights[0],
            link_weight=weights[1],
            latency_weight=weights[2],
        )

    first, last = line_at(0.0), line_at(1.0)
    close = 1e-11 * max(first.length_s, last.length_s)
    action_weight, link_weight, latency_weight = (
        np.zeros(len(change)) for change in (action_moved, link_moved, link_moved)
    )

    def count(line: _Line, width: float) -> None:
        np.add(action_weight, width * line.action_weight, out=action_weight)
        np.add(link_weight, width * line.link_weight, out=link_weight)
        np.add(latency_weight, width * line.latency_weight, out=latency_weight)

    # Between two shares the length lies between the lines of both ends and the chord. The span where these are furthest
    # apart is looked into first, so that replays, should they be too few, are spent where they tell most.
    spans: list[tuple[float, int, _Line, _Line]] = []
    spans_made = 0

    def part(line: _Line, other: _Line) -> None:
        """Count what is between two shares, or keep it to be parted where the lines cross."""
        nonlocal spans_made
        left, right = line.share, other.share
        if line.at(right) >= other.length_s - close:
            count(line, right - left)
        elif other.at(left) >= line.length_s - close:
            count(other, right - left)
        else:
            crossing = _crossing(line, other)
            chord_s = line.length_s + (other.length_s - line.length_s) * (crossing - left) / (right - left)
            doubt = (chord_s - max(line.at(crossing), other.at(crossing))) * (right - left)
            spans_made += 1
            heapq.heappush(spans, (-doubt, spans_made, line, other))

    part(first, last)
    while spans:
        _, _, line, other = heapq.heappop(spans)
        crossing = _crossing(line, other)
        if replays < _MOST_STEPS:
            found = line_at(crossing)
            if found.length_s > line.at(crossing) + close:
                part(line, found)
                part(found, other)
                continue
        count(line, crossing - line.share)
        count(other, other.share - crossing)
    compute_s, device_s = action_weight * moved["compute_s"], action_weight * moved["device_s"]
    message_s = link_weight * link_moved + latency_weight * moved["latency_s"]
    explained = float(compute_s.sum() + device_s.sum() + message_s.sum())
    return Change(
        compute_s=compute_s,
        device_s=device_s,
        message_s=message_s,
        unexplained_s=last.length_s - first.length_s - explained,
        replays=replays,
    )


def _crossing(line: _Line, other: _Line) -> float:
    """The share between theirs at which both lines are equally long."""
    steeper, left, right = other.slope_s - line.slope_s, line.share, other.share
    crossing = left + (line.length_s - other.at(left)) / steeper if steeper > 0 else (left + right) / 2
    return min(max(crossing, left), right)


def _flow(wiring: Wiring, times: Times) -> tuple[Seconds, Seconds, Seconds]:
    """One unit sent back along the critical paths, parted equally where they meet.

    What crosses actions, messages on their links, and messages' latencies.
    """
    from ppsim.explain import kernels  # numba takes a second to import, so only who explains pays

    actions, messages = len(times.end_s), len(times.arrival_s)
    weight, on_link, late = np.zeros(actions), np.zeros(messages), np.zeros(messages)
    kernels.flow(
        wiring.order,
        wiring.previous,
        wiring.inputs,
        wiring.outputs,
        wiring.ahead,
        times.ready_s,
        times.end_s,
        times.message_ready_s,
        times.left_s,
        times.arrival_s,
        _TIE * float(times.end_s.max()),
        weight,
        on_link,
        late,
    )
    return weight, on_link, late
