"""Idle spans: every stretch in which a rank does not compute, and what it waits for then."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.attribution import PARTS, Attribution
from ppsim.explain.bubble_parts import (
    EMPTYING,
    FILLING,
    START,
    Roots,
    idle_after,
    idle_before,
    idle_with_equal_stages,
    inherent_of,
    phases_of,
    replays_of,
    roots_of,
)
from ppsim.explain.usual_durations import ROUNDING
from ppsim.explain.waits import Cause, follow_waits

Seconds = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]


class IdleSpans(NamedTuple):
    """The idle spans of a step, rank after rank in the order of time.

    Parameters
    ----------
    rank, action : arrays of shape (spans,)
        Where it is, and the action that it ends with, or that it parts if it is within an overlapped pair; -1 for the
        span after a rank's last action.
    begin_s, end_s : arrays of shape (spans,)
        Seconds from the step's start.
    parts_s : array of shape (spans, parts)
        Seconds by part, in the sequence of `attribution.PARTS`. Their sum is the span's length.
    """

    rank: Integers
    action: Integers
    begin_s: Seconds
    end_s: Seconds
    parts_s: Seconds


def idle_spans(found: Attribution) -> IdleSpans:
    """Split each idle span by what was waited for, as `Attribution` splits a rank's bubble.

    Parameters
    ----------
    found : Attribution
        Of the step.

    Returns
    -------
    IdleSpans

    Notes
    -----
    What a replay without a cause spares is set against each span by itself, and not against a rank's whole filling,
    steady phase or emptying. So in steps with several causes the spans of a rank may add up to a little other parts
    than `Attribution` has; to the same bubble always.
    """
    graph, usual_s = found.graph, found.usual_s
    rounding_s = ROUNDING * found.trace.makespan_s
    waits, replays = follow_waits(graph), replays_of(graph, usual_s)
    before = roots_of(
        [waits.before_s[:, cause] for cause in Cause], [idle_before(graph, times) for times in replays], rounding_s
    )
    after = roots_of(list(waits.after_s.T), [idle_after(graph, times) for times in replays], rounding_s)
    phase = phases_of(found.trace)
    inherent = inherent_of(before.compute, idle_with_equal_stages(graph, usual_s), phase, rounding_s)

    previous, actions, ranks = graph.wiring.previous, len(phase), found.trace.ranks
    last_s = np.zeros(ranks)
    np.maximum.at(last_s, graph.wiring.rank, graph.times.end_s)
    in_pairs = np.flatnonzero(graph.inner_s > rounding_s)
    first = found.trace.program.action_start[in_pairs]
    within_s = (found.trace.end_s[first], found.trace.start_s[first + 1])
    zero_s = found.trace.start_s.min()
    rank = np.concatenate([graph.wiring.rank, np.arange(ranks), graph.wiring.rank[in_pairs]])
    begin_s = np.concatenate([np.where(previous >= 0, graph.times.end_s[previous], 0.0), last_s, within_s[0] - zero_s])
    end_s = np.concatenate([graph.times.start_s, np.full(ranks, graph.end_s), within_s[1] - zero_s])
    parts_s = np.concatenate(
        [_before_actions(before, inherent, phase), _after_the_last(after), _device_alone(graph.inner_s[in_pairs])]
    )
    action = np.concatenate([np.arange(actions), np.full(ranks, -1), in_pairs])

    chosen = np.flatnonzero(end_s - begin_s > rounding_s)
    chosen = chosen[np.lexsort((begin_s[chosen], rank[chosen]))]
    length_s = (end_s - begin_s)[chosen]
    total_s = parts_s[chosen].sum(axis=1)
    fitted = parts_s[chosen] * np.where(total_s > 0, length_s / np.where(total_s > 0, total_s, 1.0), 0.0)[:, None]
    return IdleSpans(rank[chosen], action[chosen], begin_s[chosen], end_s[chosen], fitted)


def _before_actions(roots: Roots, inherent: Seconds, phase: Integers) -> Seconds:
    """The parts of the span before each action, shape (actions, parts)."""
    total = _total(roots)
    steady = {
        "warm_up": np.where(phase == FILLING, inherent, 0.0),
        "drain": np.where(phase == EMPTYING, inherent, 0.0),
        "imbalance": roots.compute - inherent,
        "messages": roots.messages,
        "streams": roots.streams,
        "collectives": roots.collectives,
        "copies": roots.copies,
        "device": roots.device + roots.late_device,
        "straggler": roots.straggler,
    }
    return np.stack(
        [np.where(phase == START, total if part == "warm_up" else 0.0, steady[part]) for part in PARTS], axis=1
    )


def _device_alone(seconds: Seconds) -> Seconds:
    """The parts of spans within overlapped pairs, shape (spans, parts): the device's own time."""
    return np.stack([seconds if part == "device" else np.zeros_like(seconds) for part in PARTS], axis=1)


def _total(roots: Roots) -> Seconds:
    """All idle time of some roots."""
    with_messages = roots.compute + roots.messages + roots.streams
    return with_messages + roots.collectives + roots.copies + (roots.device + roots.late_device) + roots.straggler


def _after_the_last(roots: Roots) -> Seconds:
    """The parts of the span after each rank's last action, shape (p, parts): all of it is drain."""
    total = _total(roots)
    return np.stack([total if part == "drain" else np.zeros_like(total) for part in PARTS], axis=1)
