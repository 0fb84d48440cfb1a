"""Bubble parts: each rank's bubble by what was waited for and why.

The recorded times show what a rank waits for, see `explain.waits`. Where it waits for computation, replays show why
that is late: the step is run again without stragglers, then also without waits for streams, for messages, and so on.
A message waits for a stream if its link is free, but its send or receive is not posted, or its communicator carries
something else first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import GraphTimes, StepGraph, replay
from ppsim.explain.usual_durations import (
    ROUNDING,
    cut_to_usual,
    equal_stages,
    without_collectives,
    without_copies,
    without_device_waits,
    without_messages,
)
from ppsim.explain.waits import Cause, follow_waits
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

# (part, source) -> seconds of each rank, shape (p,). Warm-up and drain have the sources "compute" and each of
# `OWN_WAITS`, imbalance has "" alone, and every other part has "knock_on" and the names of its causes in `OWN_WAITS`.
BubbleParts = dict[tuple[str, str], Seconds]

# The phase that an action's wait belongs to. For a rank whose order is F0 F1 F2 B0 F3 B1 B2 B3:
#
#     wait before   F0      F1 F2 B0   F3        B1 B2 B3
#     phase         start   filling    steady    emptying
_PHASES = 4
START, FILLING, STEADY, EMPTYING = range(_PHASES)

# The parts that can make computation late, in the order in which the replays take them away, and the waits that belong
# to each. A straggler has none: ranks wait for computation that it made late.
OWN_WAITS: dict[str, tuple[Cause, ...]] = {
    "straggler": (),
    "streams": (Cause.STREAM,),
    "messages": (Cause.QUEUE, Cause.TRANSFER, Cause.LATENCY),
    "collectives": (Cause.COLLECTIVE,),
    "copies": (Cause.COPY,),
    "device": (Cause.DEVICE,),
}

_ROUNDING_SHARE = 1e-9  # of the makespan; parts that miss the bubble by more do not miss it by rounding


class Roots(NamedTuple):
    """Idle time by its root, in seconds. All arrays have one shape, and their sum is the idle time.

    Parameters
    ----------
    own : dict of Cause to array
        Idle time that ends, followed from rank to rank, at each cause but computation.
    knock_on : dict of str to array
        Idle time that ends at a computation which a part, one of `OWN_WAITS`, made late.
    compute : array
        Idle time that ends at a computation which no part made late.
    """

    own: dict[Cause, Seconds]
    knock_on: dict[str, Seconds]
    compute: Seconds

    def of(self, part: str) -> Seconds:
        """All idle time that a part causes: its own waits and its knock-on."""
        return sum((self.own[cause] for cause in OWN_WAITS[part]), start=self.knock_on[part])

    @property
    def total(self) -> Seconds:
        """The idle time."""
        return sum((self.of(part) for part in OWN_WAITS), start=self.compute)


def split_bubbles(graph: StepGraph, usual_s: Seconds) -> BubbleParts:
    """Split the bubble of each rank.

    Parameters
    ----------
    graph : StepGraph
        The step.
    usual_s : array of shape (rows,)
        What each row usually takes.

    Returns
    -------
    dict
        Seconds of each rank, shape (p,), by part and source. None is negative, and their sum is the bubble.

    Notes
    -----
    See `explain.attribution.attribute`.
    """
    trace, program = graph.trace, graph.program
    phase = phases_of(trace)

    def by_phase(seconds: Seconds) -> Seconds:
        """Sums over the actions of each rank and phase, shape (p, phases)."""
        cell = graph.wiring.rank * _PHASES + phase
        return np.asarray(np.bincount(cell, seconds, program.ranks * _PHASES), np.float64).reshape(-1, _PHASES)

    def after_start(seconds: Seconds) -> Seconds:
        """Sums over all phases but the wait before the first action, shape (p,)."""
        return np.asarray(seconds[:, FILLING:].sum(axis=1), np.float64)

    before, after, inherent_s = split_idle_time(graph, usual_s, np.arange(_PHASES), sums=by_phase)

    # Warm-up takes all idle time before a rank's first action, drain all after its last. In between they take only the
    # inherent waiting for computation. The rest of the waiting for computation is imbalance, and other waits go to
    # their own parts.
    parts: BubbleParts = {
        ("warm_up", "compute"): inherent_s[:, START] + inherent_s[:, FILLING],
        ("drain", "compute"): after.compute + inherent_s[:, EMPTYING],
        ("imbalance", ""): (before.compute - inherent_s).sum(axis=1),
    }
    for part, causes in OWN_WAITS.items():
        parts["warm_up", part] = before.of(part)[:, START]
        parts["drain", part] = after.of(part)
        parts[part, "knock_on"] = after_start(before.knock_on[part])
        parts |= {(part, cause.name.lower()): after_start(before.own[cause]) for cause in causes}
    # Idle time between the two rows of an overlapped pair is the device's.
    parts["device", "device"] += np.bincount(graph.wiring.rank, np.maximum(graph.inner_s, 0.0), program.ranks)
    return _fitted(parts, trace)


def split_idle_time(
    graph: StepGraph,
    usual_s: Seconds,
    phase: npt.NDArray[np.int64],
    *,
    sums: Callable[[Seconds], Seconds],
) -> tuple[Roots, Roots, Seconds]:
    """Split the idle time before actions, and after each rank's last action, by its root.

    Parameters
    ----------
    graph : StepGraph
        The step.
    usual_s : array of shape (rows,)
        What each row usually takes.
    phase : array
        The phase of each entry in the last dimension of what `sums` returns.
    sums : function of an array of shape (actions,)
        Adds up what is split together, such as all actions of a rank and phase: the split cuts at 0, and what is too
        much in one action and too little in another cancels in the sum. The identity splits each action by itself.

    Returns
    -------
    before : Roots
        Arrays of the shape that `sums` returns.
    after : Roots
        Arrays of shape (p,).
    inherent_s : array of the shape of `before.compute`
        The part of `before.compute` that belongs to the pipeline's filling and emptying. The rest is imbalance.

    Notes
    -----
    Before a rank's first action all of `before.compute` is inherent, in the steady phase none. While the pipeline fills
    or empties it is at most the wait that there would be if all stages took equally long and messages took no time. An
    evaluation has no backwards: all its phases but the start are steady.
    """
    rounding_s = ROUNDING * graph.trace.makespan_s
    waits, replays = follow_waits(graph), _replays(graph, usual_s)
    before = _roots(
        {cause: sums(waits.before_s[:, cause]) for cause in Cause},
        [sums(_idle_before(graph, times)) for times in replays],
        rounding_s,
    )
    after = _roots(
        {cause: waits.after_s[:, cause] for cause in Cause},
        [_idle_after(graph, times) for times in replays],
        rounding_s,
    )
    equal_s = sums(_idle_before(graph, replay(graph.wiring.without_streams(), equal_stages(graph, usual_s))))
    # The smaller of both, where they differ by more than rounding.
    at_most_equal = np.where(before.compute <= equal_s + rounding_s, before.compute, equal_s)
    inherent_s = np.where(phase == STEADY, 0.0, np.where(phase == START, before.compute, at_most_equal))
    return before, after, inherent_s


def _replays(graph: StepGraph, usual_s: Seconds) -> list[GraphTimes]:
    """The recorded times, then those without the first of `OWN_WAITS`, without the first two, and so on."""
    wiring, edge_times = graph.wiring, cut_to_usual(graph, usual_s)
    found = [graph.times]
    # Where nothing is taken away, the times before are kept as they are: a replay would differ by rounding.
    found.append(found[-1] if edge_times is graph.edge_times else replay(wiring, edge_times))
    # Without streams no message waits for a post or a communicator. It still queues on its own link.
    wiring = wiring.without_streams()
    found.append(replay(wiring, edge_times) if graph.wiring.is_on_streams else found[-1])
    edge_times = without_messages(edge_times)
    found.append(replay(wiring, edge_times))
    edge_times = without_collectives(graph, edge_times)
    found.append(replay(wiring, edge_times) if graph.gathered_s.any() else found[-1])
    edge_times = without_copies(graph, edge_times)
    found.append(replay(wiring, edge_times) if graph.loaded_s.any() else found[-1])
    found.append(replay(wiring, without_device_waits(edge_times)))
    return found


def _roots(waits: dict[Cause, Seconds], idle: list[Seconds], rounding_s: float) -> Roots:
    """Split the waiting for computation by what made that late.

    Parameters
    ----------
    waits : dict of Cause to array
        Seconds waited for each cause; arrays of one shape.
    idle : list of arrays of that shape
        The idle time in each of `_replays`.
    rounding_s : float
        Shrinkage up to this much counts as rounding, not as knock-on.

    Notes
    -----
    Each replay takes one part away. Idle time shrinks by the part's own waits, which are known, and by the waiting for
    computation that the part had made late, its knock-on. So the knock-on is the shrinkage beyond the own waits. It is
    cut to 0 below, and above to the waiting for computation that is not accounted for yet.
    """
    own = dict(waits)
    compute = own.pop(Cause.COMPUTE)
    knock_on = {}
    for (part, causes), (idle_with, idle_without) in zip(OWN_WAITS.items(), pairwise(idle), strict=True):
        spared = idle_with - idle_without - sum(own[cause] for cause in causes)
        knock_on[part] = np.where(spared > rounding_s, np.minimum(spared, compute), 0.0)
        compute = compute - knock_on[part]
    return Roots(own=own, knock_on=knock_on, compute=compute)


def phases_of(trace: Trace) -> npt.NDArray[np.int64]:
    """The phase of each action's wait, shape (actions,)."""
    program = trace.program
    phase = np.full(program.actions, STEADY)
    row_action = program.row_action
    is_forward, is_backward = program.kind == Kind.F, (program.kind == Kind.B) | (program.kind == Kind.I)
    for rank in range(program.ranks):
        first, last = int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])
        if first == last:
            continue
        rows = slice(int(program.action_start[first]), int(program.action_start[last]))
        forwards, backwards = (row_action[rows][kinds[rows]] for kinds in (is_forward, is_backward))
        if len(backwards):
            # Filling is set last: in AFAB the first backward follows the last forward, and its wait counts as filling.
            phase[forwards[-1] + 1 : last] = EMPTYING
            phase[first : backwards[0] + 1] = FILLING
        phase[first] = START
    return phase


def _idle_before(graph: StepGraph, times: GraphTimes) -> Seconds:
    """The idle time before each action, shape (actions,)."""
    previous = graph.wiring.previous
    return np.maximum(times.start_s - np.where(previous >= 0, times.end_s[previous], 0.0), 0.0)


def _idle_after(graph: StepGraph, times: GraphTimes) -> Seconds:
    """The idle time after each rank's last action, shape (p,)."""
    last = np.zeros(graph.program.ranks)
    np.maximum.at(last, graph.wiring.rank, times.end_s)
    return float(times.end_s.max()) - last


def _fitted(parts: BubbleParts, trace: Trace) -> BubbleParts:
    """The parts, corrected so that on each rank they add up to the bubble.

    Usually they miss it by rounding only, and the largest part takes the difference. If a rank's rows overlap in time,
    or clocks of ranks disagree, they miss it by more: then all parts are scaled.
    """
    table = np.maximum(np.stack(list(parts.values())), 0.0)
    for rank, bubble_s in enumerate(trace.bubble_s.tolist()):
        column = table[:, rank]  # a view: its changes are the table's
        wanted = max(bubble_s, 0.0)
        total = math.fsum(column)
        if total > 0 and abs(total - wanted) > _ROUNDING_SHARE * trace.makespan_s:
            column *= wanted / total
        # Adding what is missing to the largest part rounds again, so this is repeated until nothing is missing.
        for _ in range(len(column)):
            missing = wanted - math.fsum(column)
            if missing == 0:
                break
            # Idle time of which no part knows, as on a rank without actions, counts as drain.
            largest = int(np.argmax(column)) if column.any() else list(parts).index(("drain", "compute"))
            column[largest] = max(column[largest] + missing, 0.0)
    return dict(zip(parts, table, strict=True))
