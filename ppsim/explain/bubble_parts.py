"""Pieces: each rank's bubble by what was waited for and why: the step is replayed without one cause after another."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import StepGraph, Times, replay
from ppsim.explain.usual_durations import DUST, balanced, cut_to_usual, without_messages
from ppsim.explain.waits import Cause, follow_waits
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]
Phased = npt.NDArray[np.float64]
Pieces = dict[tuple[str, str], Seconds]

_MESSAGE_CAUSES = (Cause.QUEUE, Cause.TRANSFER, Cause.LATENCY)
_EDGE, _FILLING, _STEADY, _EMPTYING = range(4)  # where in a rank's order a wait stands


def bubble_pieces(graph: StepGraph, usual: Seconds) -> Pieces:
    """Seconds of each rank's bubble, shape (p,), by (part, cause); their sum is the bubble, and none is negative.

    usual: what each row usually takes, shape (rows,). What is found how: see `explain.attribute`.
    """
    trace, program, wiring = graph.trace, graph.program, graph.wiring
    phase = _phases(trace)
    waits = follow_waits(graph)
    dust = DUST * trace.makespan_s

    causes = np.stack([_by_phase(graph, phase, waits.before_s[:, cause]) for cause in Cause])  # (causes, p, phases)
    compute, device = causes[Cause.COMPUTE], causes[Cause.DEVICE]
    under_way = causes[list(_MESSAGE_CAUSES)].sum(axis=0)

    # The step replayed with one cause after the other taken away; what that spares of the waiting for computation.
    calm = (
        graph.times
        if (cut := cut_to_usual(graph, usual)) is None
        else replay(wiring, replace(graph.delays, compute_s=cut))
    )
    free = replay(wiring, free_delays := without_messages(graph, cut))
    prompt = replay(wiring, replace(free_delays, device_s=np.zeros(program.actions)))
    even = replay(wiring, balanced(graph, usual))
    actual_s, calm_s, free_s, prompt_s, even_s = (
        _by_phase(graph, phase, _gaps(graph, times)) for times in (graph.times, calm, free, prompt, even)
    )
    straggler = _share(actual_s - calm_s, compute, dust)
    rest = compute - straggler
    late_messages = _share(calm_s - free_s - under_way, rest, dust)
    rest -= late_messages
    late_device = _share(free_s - prompt_s - device, rest, dust)
    rest -= late_device
    inherent = np.where(rest <= even_s + dust, rest, even_s)
    inherent[:, _STEADY] = 0.0
    inherent[:, _EDGE] = rest[:, _EDGE]  # is warm-up as a whole
    actual_s, calm_s, free_s, prompt_s = (_after(graph, times) for times in (graph.times, calm, free, prompt))
    drain = {"compute": waits.after_s[:, Cause.COMPUTE].copy(), "device": waits.after_s[:, Cause.DEVICE].copy()}
    drain["messages"] = waits.after_s[:, list(_MESSAGE_CAUSES)].sum(axis=1)
    for cause, spared in (
        ("straggler", actual_s - calm_s),
        ("messages", calm_s - free_s - drain["messages"]),
        ("device", free_s - prompt_s - drain["device"]),
    ):
        late = _share(spared, drain["compute"], dust)
        drain["compute"] -= late
        drain[cause] = drain.get(cause, 0.0) + late

    inner = np.bincount(wiring.rank, np.maximum(graph.inner_s, 0.0), program.ranks)
    within = causes[:, :, _EDGE + 1 :].sum(axis=2)
    warm_up_of = {
        "compute": inherent[:, _EDGE] + inherent[:, _FILLING],
        "messages": (under_way + late_messages)[:, _EDGE],
        "device": (device + late_device)[:, _EDGE],
        "straggler": straggler[:, _EDGE],
    }
    drain["compute"] += inherent[:, _EMPTYING]
    drain_of = {cause: drain[cause] for cause in warm_up_of}
    pieces = {
        **{("warm_up", cause): seconds for cause, seconds in warm_up_of.items()},
        **{("drain", cause): seconds for cause, seconds in drain_of.items()},
        ("imbalance", ""): (rest - inherent).sum(axis=1),
        ("messages", "queueing"): within[Cause.QUEUE],
        ("messages", "transfer"): within[Cause.TRANSFER],
        ("messages", "latency"): within[Cause.LATENCY],
        ("messages", "knock_on"): late_messages[:, _EDGE + 1 :].sum(axis=1),
        ("device", ""): within[Cause.DEVICE] + inner,
        ("device", "knock_on"): late_device[:, _EDGE + 1 :].sum(axis=1),
        ("straggler", ""): straggler[:, _EDGE + 1 :].sum(axis=1),
    }
    return _fitted(pieces, trace)


def _phases(trace: Trace) -> npt.NDArray[np.int64]:
    """Where each action's wait stands in its rank's order, shape (actions,)."""
    program = trace.program
    phase = np.full(program.actions, _STEADY)
    row_action = program.row_action
    is_forward, is_backward = program.kind == Kind.F, (program.kind == Kind.B) | (program.kind == Kind.I)
    for rank in range(program.ranks):
        first, last = int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])
        if first == last:
            continue
        rows = slice(int(program.action_start[first]), int(program.action_start[last]))
        forwards, backwards = (row_action[rows][kinds[rows]] for kinds in (is_forward, is_backward))
        if len(backwards):
            phase[forwards[-1] + 1 : last] = _EMPTYING
            phase[first : backwards[0] + 1] = _FILLING
        phase[first] = _EDGE
    return phase


def _share(spared: Seconds, most: Seconds, dust: float) -> Seconds:
    """What was spared, between nothing and the most that it can be; what is mere rounding is nothing."""
    return np.where(spared > dust, np.minimum(spared, most), 0.0)


def _gaps(graph: StepGraph, times: Times) -> Seconds:
    """The idle time before each action, (actions,)."""
    previous = graph.wiring.previous
    return np.maximum(times.start_s - np.where(previous >= 0, times.end_s[previous], 0.0), 0.0)


def _after(graph: StepGraph, times: Times) -> Seconds:
    """The idle time after each rank's last action, (p,)."""
    last = np.zeros(graph.program.ranks)
    np.maximum.at(last, graph.wiring.rank, times.end_s)
    return times.end_s.max() - last


def _by_phase(graph: StepGraph, phase: npt.NDArray[np.int64], seconds: Seconds) -> Phased:
    """Sums over the actions of each rank and phase, shape (p, phases)."""
    ranks = graph.program.ranks
    cell = graph.wiring.rank * 4 + phase
    return np.asarray(np.bincount(cell, seconds, ranks * 4).reshape(ranks, 4), np.float64)


def _fitted(pieces: Pieces, trace: Trace) -> Pieces:
    """The pieces such that on each rank their exact sum is the bubble.

    They are that already but for rounding, unless rows of a rank overlap: then all are shortened alike.
    """
    table = np.maximum(np.stack(list(pieces.values())), 0.0)
    for rank, bubble_s in enumerate(trace.bubble_s.tolist()):
        column = table[:, rank]
        wanted = max(bubble_s, 0.0)
        total = math.fsum(column)
        if total > 0 and abs(total - wanted) > 1e-9 * trace.makespan_s:
            column *= wanted / total
        for _ in range(len(column)):
            missing = wanted - math.fsum(column)
            if missing == 0:
                break
            largest = int(np.argmax(column)) if column.any() else list(pieces).index(("drain", "compute"))
            column[largest] = max(column[largest] + missing, 0.0)
    return dict(zip(pieces, table, strict=True))
