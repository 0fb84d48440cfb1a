"""Idle spans: every stretch in which a rank does not compute, and what it waits for then."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.attribution import PARTS, Attribution
from ppsim.explain.bubble_parts import (
    EMPTYING,
    FILLING,
    OWN_WAITS,
    START,
    Roots,
    phases_of,
    split_idle_time,
)
from ppsim.explain.usual_durations import ROUNDING

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
    phase = phases_of(found.trace)
    before, after, inherent = split_idle_time(graph, usual_s, phase, sums=np.asarray)

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
        [
            _before_actions(before, inherent, phase),
            _one_part("drain", after.total),
            _one_part("device", graph.inner_s[in_pairs]),
        ]
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
    later = {part: roots.of(part) for part in OWN_WAITS} | {
        "warm_up": np.where(phase == FILLING, inherent, 0.0),
        "drain": np.where(phase == EMPTYING, inherent, 0.0),
        "imbalance": roots.compute - inherent,
    }
    first = _one_part("warm_up", roots.total)
    return np.where((phase == START)[:, None], first, np.stack([later[part] for part in PARTS], axis=1))


def _one_part(name: str, seconds: Seconds) -> Seconds:
    """The parts of spans that belong to one part as a whole, shape (spans, parts)."""
    return np.stack([seconds if part == name else np.zeros_like(seconds) for part in PARTS], axis=1)
