"""Bubble parts: each rank's bubble by what was waited for and why.

What a rank waits for is read off the times, see `explain.waits`. Why computation came late is found by replaying the
step without one cause after another.
"""

from __future__ import annotations

import math
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

BubbleParts = dict[tuple[str, str], Seconds]  # (part, cause) -> seconds of each rank, shape (p,)

# Where in its rank's order an action's wait stands. For a rank whose order is F0 F1 F2 B0 F3 B1 B2 B3:
#
#     wait before   F0      F1 F2 B0   F3        B1 B2 B3
#     phase         start   filling    steady    emptying
_PHASES = 4
START, FILLING, STEADY, EMPTYING = range(_PHASES)
_AFTER_START = slice(FILLING, None)

_FITTED = 1e-9  # of the makespan: parts that miss the bubble by more are scaled, by less the largest one is corrected


class Replays(NamedTuple):
    """The step's times without one cause after another; each is also without the causes before it."""

    recorded: GraphTimes
    without_excess: GraphTimes  # no action longer than usual
    without_streams: GraphTimes  # every message sets off as it is made, on a link of its own
    without_messages: GraphTimes
    without_collectives: GraphTimes
    without_copies: GraphTimes
    without_device_waits: GraphTimes


class Roots(NamedTuple):
    """Seconds of idle time by what it comes from, all arrays of one shape; the sum of all is the idle time.

    queueing, stream, transfer, latency, collective, copy, device: what is waited for at the moment. All else is waiting
    for computation, by what made that late: an action longer than usual (straggler), streams, messages, collectives,
    copies or devices elsewhere (late_streams, late_messages, ...), or nothing of these (compute).
    """

    queueing: Seconds
    stream: Seconds
    transfer: Seconds
    latency: Seconds
    collective: Seconds
    copy: Seconds
    device: Seconds
    straggler: Seconds
    late_streams: Seconds
    late_messages: Seconds
    late_collectives: Seconds
    late_copies: Seconds
    late_device: Seconds
    compute: Seconds

    @property
    def messages(self) -> Seconds:
        """All that messages cause."""
        return (self.queueing + self.transfer + self.latency) + self.late_messages

    @property
    def streams(self) -> Seconds:
        """All that streams cause."""
        return self.stream + self.late_streams

    @property
    def collectives(self) -> Seconds:
        """All that gathering parameters causes."""
        return self.collective + self.late_collectives

    @property
    def copies(self) -> Seconds:
        """All that loading activations causes."""
        return self.copy + self.late_copies


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
        Seconds of each rank, shape (p,), by part and cause. None is negative, and their sum is the bubble.

    Notes
    -----
    See `explain.attribution.attribute`.
    """
    trace, program = graph.trace, graph.program
    rounding_s = ROUNDING * trace.makespan_s
    phase = phases_of(trace)

    def by_phase(seconds: Seconds) -> Seconds:
        """Sums over the actions of each rank and phase, shape (p, phases)."""
        cell = graph.wiring.rank * _PHASES + phase
        return np.asarray(np.bincount(cell, seconds, program.ranks * _PHASES), np.float64).reshape(-1, _PHASES)

    waits, replays = follow_waits(graph), replays_of(graph, usual_s)
    before = roots_of(
        [by_phase(waits.before_s[:, cause]) for cause in Cause],
        [by_phase(idle_before(graph, times)) for times in replays],
        rounding_s,
    )
    after = roots_of(list(waits.after_s.T), [idle_after(graph, times) for times in replays], rounding_s)

    # Of the waiting for computation that nothing made late, equal stages with free messages would wait for as much: the
    # pipeline fills or empties. What is beyond that is imbalance, and so is all of it in the steady phase. Before the
    # first action all of it counts as filling.
    equal_s = by_phase(idle_with_equal_stages(graph, usual_s))
    inherent = inherent_of(before.compute, equal_s, np.arange(_PHASES), rounding_s)

    in_pairs = np.bincount(graph.wiring.rank, np.maximum(graph.inner_s, 0.0), program.ranks)
    parts: BubbleParts = {
        ("warm_up", "compute"): inherent[:, START] + inherent[:, FILLING],
        ("warm_up", "messages"): before.messages[:, START],
        ("warm_up", "streams"): before.streams[:, START],
        ("warm_up", "collectives"): before.collectives[:, START],
        ("warm_up", "copies"): before.copies[:, START],
        ("warm_up", "device"): (before.device + before.late_device)[:, START],
        ("warm_up", "straggler"): before.straggler[:, START],
        ("drain", "compute"): after.compute + inherent[:, EMPTYING],
        ("drain", "messages"): after.messages,
        ("drain", "streams"): after.streams,
        ("drain", "collectives"): after.collectives,
        ("drain", "copies"): after.copies,
        ("drain", "device"): after.device + after.late_device,
        ("drain", "straggler"): after.straggler,
        ("imbalance", ""): (before.compute - inherent).sum(axis=1),
        ("messages", "queueing"): before.queueing[:, _AFTER_START].sum(axis=1),
        ("messages", "transfer"): before.transfer[:, _AFTER_START].sum(axis=1),
        ("messages", "latency"): before.latency[:, _AFTER_START].sum(axis=1),
        ("messages", "knock_on"): before.late_messages[:, _AFTER_START].sum(axis=1),
        ("streams", ""): before.stream[:, _AFTER_START].sum(axis=1),
        ("streams", "knock_on"): before.late_streams[:, _AFTER_START].sum(axis=1),
        ("collectives", ""): before.collective[:, _AFTER_START].sum(axis=1),
        ("collectives", "knock_on"): before.late_collectives[:, _AFTER_START].sum(axis=1),
        ("copies", ""): before.copy[:, _AFTER_START].sum(axis=1),
        ("copies", "knock_on"): before.late_copies[:, _AFTER_START].sum(axis=1),
        ("device", ""): before.device[:, _AFTER_START].sum(axis=1) + in_pairs,
        ("device", "knock_on"): before.late_device[:, _AFTER_START].sum(axis=1),
        ("straggler", ""): before.straggler[:, _AFTER_START].sum(axis=1),
    }
    return _fitted(parts, trace)


def inherent_of(compute: Seconds, equal_s: Seconds, phase: npt.NDArray[np.int64], rounding_s: float) -> Seconds:
    """The waiting for computation that belongs to the pipeline's filling and emptying; the rest is imbalance."""
    inherent = np.where(compute <= equal_s + rounding_s, compute, equal_s)
    return np.where(phase == STEADY, 0.0, np.where(phase == START, compute, inherent))


def replays_of(graph: StepGraph, usual_s: Seconds) -> Replays:
    edge_times = cut_to_usual(graph, usual_s)
    # Recorded times are kept as they are where nothing is cut: a replay would differ by rounding.
    without_excess = graph.times if edge_times is graph.edge_times else replay(graph.wiring, edge_times)
    wiring = graph.wiring.without_streams()
    without_streams = replay(wiring, edge_times) if graph.wiring.is_on_streams else without_excess
    edge_times = without_messages(edge_times)
    free_messages = replay(wiring, edge_times)
    edge_times = without_collectives(graph, edge_times)
    gathered = replay(wiring, edge_times) if graph.gathered_s.any() else free_messages
    edge_times = without_copies(graph, edge_times)
    return Replays(
        recorded=graph.times,
        without_excess=without_excess,
        without_streams=without_streams,
        without_messages=free_messages,
        without_collectives=gathered,
        without_copies=replay(wiring, edge_times) if graph.loaded_s.any() else gathered,
        without_device_waits=replay(wiring, without_device_waits(edge_times)),
    )


def roots_of(waits: list[Seconds], idle: list[Seconds], rounding_s: float) -> Roots:
    """Split the waiting for computation by what made it late.

    Taking a cause away shortens the idle time by what is waited for that cause itself, and by what it makes computation
    late elsewhere. The first is known, so the rest is the second, but at most as much as there is to explain.

    Parameters
    ----------
    waits : list of arrays of one shape
        Seconds by `Cause`.
    idle : list of arrays of that shape
        The idle time in each of `Replays`.
    rounding_s : float
        What is shorter is rounding.
    """
    compute, queueing, stream, transfer, latency, device, collective, copy = waits
    recorded, without_excess, without_streams, without_messages, without_collectives, *last = idle
    without_copies, without_device_waits = last
    straggler = _share(recorded - without_excess, compute, rounding_s)
    compute = compute - straggler
    late_streams = _share(without_excess - without_streams - stream, compute, rounding_s)
    compute = compute - late_streams
    late_messages = _share(without_streams - without_messages - (queueing + transfer + latency), compute, rounding_s)
    compute = compute - late_messages
    late_collectives = _share(without_messages - without_collectives - collective, compute, rounding_s)
    compute = compute - late_collectives
    late_copies = _share(without_collectives - without_copies - copy, compute, rounding_s)
    compute = compute - late_copies
    late_device = _share(without_copies - without_device_waits - device, compute, rounding_s)
    return Roots(
        queueing=queueing,
        stream=stream,
        transfer=transfer,
        latency=latency,
        collective=collective,
        copy=copy,
        device=device,
        straggler=straggler,
        late_streams=late_streams,
        late_messages=late_messages,
        late_collectives=late_collectives,
        late_copies=late_copies,
        late_device=late_device,
        compute=compute - late_device,
    )


def _share(spared: Seconds, most: Seconds, rounding_s: float) -> Seconds:
    """What was spared, at most `most`, and nothing where it is negative or rounding."""
    return np.where(spared > rounding_s, np.minimum(spared, most), 0.0)


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


def idle_before(graph: StepGraph, times: GraphTimes) -> Seconds:
    """The idle time before each action, shape (actions,)."""
    previous = graph.wiring.previous
    return np.maximum(times.start_s - np.where(previous >= 0, times.end_s[previous], 0.0), 0.0)


def idle_with_equal_stages(graph: StepGraph, usual_s: Seconds) -> Seconds:
    """The idle time before each action if stages were equal and messages free, shape (actions,)."""
    return idle_before(graph, replay(graph.wiring.without_streams(), equal_stages(graph, usual_s)))


def idle_after(graph: StepGraph, times: GraphTimes) -> Seconds:
    """The idle time after each rank's last action, shape (p,)."""
    last = np.zeros(graph.program.ranks)
    np.maximum.at(last, graph.wiring.rank, times.end_s)
    return float(times.end_s.max()) - last


def _fitted(parts: BubbleParts, trace: Trace) -> BubbleParts:
    """The parts, corrected so that on each rank their exact sum is the bubble.

    They differ from it by rounding only, unless rows of a rank overlap: then all are shortened alike.
    """
    table = np.maximum(np.stack(list(parts.values())), 0.0)
    for rank, bubble_s in enumerate(trace.bubble_s.tolist()):
        column = table[:, rank]
        wanted = max(bubble_s, 0.0)
        total = math.fsum(column)
        if total > 0 and abs(total - wanted) > _FITTED * trace.makespan_s:
            column *= wanted / total
        # Adding what is missing to the largest part rounds again, so this is repeated until nothing is missing.
        for _ in range(len(column)):
            missing = wanted - math.fsum(column)
            if missing == 0:
                break
            largest = int(np.argmax(column)) if column.any() else list(parts).index(("drain", "compute"))
            column[largest] = max(column[largest] + missing, 0.0)
    return dict(zip(parts, table, strict=True))
