"""Change: how much of the difference between two steps' lengths each single delay explains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.explain.graph import DELAYS, Delays, Times, Wiring, replay

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

    They add up to the difference of the two steps' lengths; unexplained_s is rounding, or what replays were too few
    for.
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
            float(weight @ change)
            for weight, change in zip(weights, (action_moved, link_moved, moved["latency_s"]), strict=True)
        )
        return _Line(
            share=share,
            length_s=max(times.end_s),
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

    spans = [(0.0, first.length_s, first, 1.0, last.length_s, last)]
    while spans:
        left, left_s, line, right, right_s, other = spans.pop()
        if line.at(right) >= right_s - close:
            count(line, right - left)
            continue
        if other.at(left) >= left_s - close:
            count(other, right - left)
            continue
        steeper = other.slope_s - line.slope_s
        crossing = left + (line.at(left) - other.at(left)) / steeper if steeper > 0 else (left + right) / 2
        crossing = min(max(crossing, left), right)
        if replays >= _MOST_STEPS:
            count(line, crossing - left)
            count(other, right - crossing)
            continue
        found = line_at(crossing)
        if found.length_s <= line.at(crossing) + close:
            count(line, crossing - left)
            count(other, right - crossing)
            continue
        spans.append((left, left_s, line, crossing, found.length_s, found))
        spans.append((crossing, found.length_s, found, right, right_s, other))
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


def _flow(wiring: Wiring, times: Times) -> tuple[Seconds, Seconds, Seconds]:
    """One unit sent back along the critical paths, parted equally where they meet.

    What crosses actions, messages on their links, and messages' latencies.
    """
    length = max(times.end_s)
    tie = _TIE * length
    ends = [action for action, end in enumerate(times.end_s) if end >= length - tie]
    weight, on_link, late = [0.0] * len(times.end_s), [0.0] * len(times.arrival_s), [0.0] * len(times.arrival_s)
    for action in ends:
        weight[action] = 1.0 / len(ends)
    previous, inputs, outputs, ahead = wiring.previous, wiring.inputs, wiring.outputs, wiring.ahead
    for action in reversed(wiring.order):
        for message in reversed(outputs[action]):
            on_link[message] += late[message]
            flow = on_link[message]
            if flow == 0.0:
                continue
            ready, front = times.message_ready_s[message] - tie, ahead[message]
            behind = front >= 0 and times.left_s[front] >= ready
            own = times.end_s[action] >= ready
            share = flow / (behind + own)
            if behind:
                on_link[front] += share
            if own:
                weight[action] += share
        flow = weight[action]
        if flow == 0.0:
            continue
        before, ready = previous[action], times.ready_s[action] - tie
        binding = [message for message in inputs[action] if times.arrival_s[message] >= ready]
        is_free_late = (times.end_s[before] if before >= 0 else 0.0) >= ready
        share = flow / (len(binding) + is_free_late)
        if is_free_late and before >= 0:
            weight[before] += share
        for message in binding:
            late[message] += share
    return np.array(weight), np.array(on_link), np.array(late)
