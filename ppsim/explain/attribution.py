"""Attribution: what each rank waited for in a step; the parts add up to its bubble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.action import Kind
from ppsim.costs import StageCost
from ppsim.explain.critical_path import CriticalPath, path_of, slack_of
from ppsim.explain.graph import Delays, StepGraph, Times, replay
from ppsim.explain.waits import Cause, follow_waits
from ppsim.simulate import row_durations
from ppsim.trace import Trace

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
Phased = npt.NDArray[np.float64]

PARTS = ("warm_up", "drain", "imbalance", "messages", "device", "straggler")
_MESSAGE_CAUSES = (Cause.QUEUE, Cause.TRANSFER, Cause.LATENCY)
_EDGE, _FILLING, _STEADY, _EMPTYING = range(4)  # where in a rank's order a wait stands
_DUST = 1e-12  # of the makespan: shorter times are rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The bubble of each rank in six parts, each an array of seconds of shape (p,), none negative.

        rank 0  F0 F1 F2 F3 w  w  w  w  w  w  B0 B1 B2 B3          w  warm-up: waiting for the first backward
        rank 1  w  F0 F1 F2 F3 w  w     B0 B1 B2 B3  d             w  warm-up: before the first action
        rank 2  w  w  F0 F1 F2 F3 B0 B1 B2 B3  d  d                d  drain: after the last action

    warm_up_s: before the rank's first action, whatever the cause; and from then to its first backward the waiting for
    computation that the order asks for even of equal stages with free messages (the pipeline fills).
    drain_s: after its last action, whatever the cause; and after its last forward the waiting for computation that the
    order asks for even of equal stages with free messages (the pipeline empties). All of a rank without actions.
    imbalance_s: other waiting for another rank's computation: stages that take unequally long, or an order that does
    not suit its costs.
    messages_s: waiting while a message is under way (queued on its link, in transfer, or in its latency), and the
    waiting for computation that messages had made late (messages_knock_on_s).
    device_s: inputs there, rank free, and yet not started; and the waiting for computation made late by that elsewhere
    (device_knock_on_s). In a simulation: another rank's work on a shared device, or the stated cost of dispatching. In
    a measurement: the executor's own time and the machine's, from one action to the next.
    straggler_s: the waiting for computation that is there because actions took longer than usual; see `attribute`. A
    delay handed on from rank to rank is still the straggler's.

    So with equal stages and free messages AFAB has warm_up_s[r] = r F + (p - 1 - r)(F + B) and drain_s[r] = r B, 1F1B
    (m >= p) has warm_up_s[r] = r F + (p - 1 - r) B and drain_s[r] = r B + (p - 1 - r) F, and nothing else.

    A wait is followed to its root: who waits for a rank that itself waits for a message waits for the message.
    warm_up_of_s, drain_of_s: those two parts by cause ("compute", "messages", "device", "straggler"), each (p,):
    "compute" is the fill and drain that no faster link or device takes away. queueing_s,
    transfer_s, latency_s: with messages_knock_on_s they make up messages_s; a measured message is all transfer.
    usual_s: shape (rows,), what counted as each row's usual duration.
    """

    trace: Trace = field(repr=False)
    warm_up_s: Seconds
    drain_s: Seconds
    imbalance_s: Seconds
    messages_s: Seconds
    device_s: Seconds
    straggler_s: Seconds
    warm_up_of_s: Mapping[str, Seconds] = field(repr=False)
    drain_of_s: Mapping[str, Seconds] = field(repr=False)
    queueing_s: Seconds = field(repr=False)
    transfer_s: Seconds = field(repr=False)
    latency_s: Seconds = field(repr=False)
    messages_knock_on_s: Seconds = field(repr=False)
    device_knock_on_s: Seconds = field(repr=False)
    usual_s: Seconds = field(repr=False)
    _graph: StepGraph = field(repr=False)

    @property
    def parts_s(self) -> dict[str, Seconds]:
        """The six parts by name, each of shape (p,); their sum is `bubble_s`."""
        return {name: getattr(self, f"{name}_s") for name in PARTS}

    @property
    def bubble_s(self) -> Seconds:
        """The trace's bubble of each rank, shape (p,)."""
        return self.trace.bubble_s

    @property
    def fractions(self) -> dict[str, float]:
        """Each part over all ranks as a share of p times the makespan; their sum is the trace's `bubble_fraction`."""
        total = self.trace.ranks * self.trace.makespan_s
        return {name: math.fsum(part) / total if total > 0 else 0.0 for name, part in self.parts_s.items()}

    @cached_property
    def critical_path(self) -> CriticalPath:
        """The chain of computations, messages and gaps that is as long as the step."""
        return path_of(self._graph)

    @cached_property
    def slack_s(self) -> Seconds:
        """By how much each row could end later without a longer step, shape (rows,); 0 on the critical path."""
        return slack_of(self._graph)[self.trace.program.row_action]

    @property
    def _messages_of_s(self) -> dict[str, Seconds]:
        return {
            "queueing": self.queueing_s,
            "transfer": self.transfer_s,
            "latency": self.latency_s,
            "knock_on": self.messages_knock_on_s,
        }

    def to_frame(self) -> pandas.DataFrame:
        """A row per rank: rank, bubble_s, the six parts, and what messages, warm-up and drain are made of."""
        import pandas

        inside = {f"messages_{name}_s": seconds for name, seconds in self._messages_of_s.items()}
        inside["device_knock_on_s"] = self.device_knock_on_s
        for part, causes in (("warm_up", self.warm_up_of_s), ("drain", self.drain_of_s)):
            inside |= {f"{part}_{cause}_s": seconds for cause, seconds in causes.items()}
        parts = {f"{name}_s": part for name, part in self.parts_s.items()}
        return pandas.DataFrame({"rank": range(self.trace.ranks), "bubble_s": self.bubble_s, **parts, **inside})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, for JSON; the critical path by what it is made of and segment by segment."""
        return {
            "clock": self.trace.clock,
            "makespan_s": self.trace.makespan_s,
            "bubble_s": self.bubble_s.tolist(),
            "bubble_fraction": self.trace.bubble_fraction,
            **{f"{name}_s": part.tolist() for name, part in self.parts_s.items()},
            "fractions": self.fractions,
            "messages_of_s": {name: seconds.tolist() for name, seconds in self._messages_of_s.items()},
            "device_knock_on_s": self.device_knock_on_s.tolist(),
            "warm_up_of_s": {name: seconds.tolist() for name, seconds in self.warm_up_of_s.items()},
            "drain_of_s": {name: seconds.tolist() for name, seconds in self.drain_of_s.items()},
            "critical_path": self.critical_path.to_dict(),
        }

    def __str__(self) -> str:
        makespan_s = self.trace.makespan_s
        names = [name.replace("_", "-") for name in PARTS]
        lines = [
            f"{self.trace.schedule}",
            f"makespan {makespan_s:.6g} s, bubble {self.trace.bubble_fraction:.2%} of all ranks' time",
            "",
            "rank      bubble (s)" + "".join(f"  {name:>12}" for name in names),
        ]
        columns = np.stack(list(self.parts_s.values()), axis=1)
        for rank, (bubble, row) in enumerate(zip(self.bubble_s.tolist(), columns.tolist(), strict=True)):
            lines.append(f"{rank:>4}  {bubble:>14.6g}" + "".join(f"  {seconds:>12.6g}" for seconds in row))
        shares = "".join(f"  {share:>12.2%}" for share in self.fractions.values())
        lines += [f" all  {self.trace.bubble_fraction:>14.2%}{shares}", "", str(self.critical_path)]
        return "\n".join(lines)


def attribute(trace: Trace, *, expected: Sequence[StageCost] | None = None) -> Attribution:
    """Split each rank's bubble by what the rank waited for; from a simulated and a measured trace alike.

    Which waiting is for computation, for a message or for a device is read off the times, moment by moment
    (`explain.waits`). Why computation came late is then asked by replaying the step with one cause after the other
    taken away: actions longer than usual are cut to that (what this spares is the straggler's), then messages cost
    nothing, then no device is waited for, at last all stages take equally long (what is left is the pipeline's fill
    and drain, what this spared is imbalance). Each is counted for a rank before its first backward, after its last
    forward, and between, and is no more than the rank's waiting for computation there.

    Usual is the median duration of the same stage and kind (in an overlapped pair apart) in this trace; or, with
    `expected` (a cost per stage), what the stage should take, so that a rank slow as a whole is a straggler too.

    Parts add up to `trace.bubble_s` to the last bit or two. Times that cannot be (a message there before it was sent,
    by clocks that disagree) shorten the part they would make negative.

    Raises ValueError if `expected` does not fit the stages, or if rows end before they start or overlap on a rank so
    much that it computes longer than the step lasts. ScheduleError if the schedule could not have run.
    """
    if expected is not None and len(expected) != trace.schedule.stages:
        raise ValueError(
            f"{len(expected)} expected costs for a schedule of {trace.schedule.stages} stages: give one for each"
        )
    _check_times(trace)
    graph = StepGraph.of(trace)
    program, wiring = trace.program, graph.wiring
    phase = _phases(trace)
    waits = follow_waits(graph)
    usual = _usual_s(trace, expected)
    dust = _DUST * trace.makespan_s

    causes = np.stack([_by_phase(graph, phase, waits.before_s[:, cause]) for cause in Cause])  # (causes, p, phases)
    compute, device = causes[Cause.COMPUTE], causes[Cause.DEVICE]
    under_way = causes[list(_MESSAGE_CAUSES)].sum(axis=0)

    # The step replayed with one cause after the other taken away; what that spares of the waiting for computation.
    calm = graph.times if (cut := _cut(graph, usual)) is None else replay(wiring, replace(graph.delays, compute_s=cut))
    free = replay(wiring, free_delays := _without_messages(graph, cut))
    prompt = replay(wiring, replace(free_delays, device_s=np.zeros(program.actions)))
    even = replay(wiring, _balanced(graph, usual))
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
    return _assembled(graph, _fitted(pieces, trace), usual)


def critical_path(trace: Trace) -> CriticalPath:
    """The chain of computations, messages and gaps that is as long as the step; `attribute(trace).critical_path`."""
    _check_times(trace)
    return path_of(StepGraph.of(trace))


def _check_times(trace: Trace) -> None:
    for name in ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s"):
        if not np.isfinite(getattr(trace, name)).all():
            raise ValueError(f"the trace's {name} holds a time that is no finite number: record every row and message")
    backward = trace.end_s < trace.start_s
    if backward.any():
        row = int(np.argmax(backward))
        raise ValueError(
            f"{trace.program.action_of(row)} ends at {trace.end_s[row]!r} s, before its start at "
            f"{trace.start_s[row]!r} s: record both on the rank's own clock"
        )
    too_busy = trace.bubble_s < -1e-9 * trace.makespan_s
    if too_busy.any():
        rank = int(np.argmax(too_busy))
        raise ValueError(
            f"rank {rank} computes for {trace.compute_s[rank]:.6g} s in a step of {trace.makespan_s:.6g} s: its rows "
            "overlap in time; record one after the other"
        )


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


def _usual_s(trace: Trace, expected: Sequence[StageCost] | None) -> Seconds:
    """What each row usually takes, shape (rows,)."""
    program = trace.program
    if expected is not None:
        return row_durations(program, expected, overlap=float(trace.details.get("overlap", 1.0)))
    lengths = trace.end_s - trace.start_s
    in_pair = np.diff(program.action_start)[program.row_action] == 2
    group = (program.stage * len(Kind) + program.kind) * 2 + in_pair
    by_group = np.argsort(group, kind="stable")
    usual = np.empty(len(lengths))
    for rows in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
        usual[rows] = np.median(lengths[rows])
    return usual


def _cut(graph: StepGraph, usual: Seconds) -> Seconds | None:
    """Each action's time with its rows cut to their usual durations, (actions,); None if none is longer."""
    trace = graph.trace
    lengths = trace.end_s - trace.start_s
    excess = np.where(lengths > usual * (1 + 1e-9) + _DUST * trace.makespan_s, lengths - usual, 0.0)
    if not excess.any():
        return None
    return graph.delays.compute_s - np.add.reduceat(excess, trace.program.action_start[:-1])


def _balanced(graph: StepGraph, usual: Seconds) -> Delays:
    """The step of equal stages with free messages: every row takes its kind's mean usual time."""
    program = graph.program
    in_pair = np.diff(program.action_start)[program.row_action] == 2
    group = program.kind * 2 + in_pair
    mean = np.bincount(group, usual) / np.maximum(np.bincount(group), 1)
    compute_s = np.add.reduceat(mean[group], program.action_start[:-1])
    return replace(_without_messages(graph, compute_s), device_s=np.zeros(program.actions))


def _without_messages(graph: StepGraph, cut: Seconds | None) -> Delays:
    """The step with usual durations and free messages."""
    nothing = np.zeros(len(graph.program.messages))
    return replace(
        graph.delays,
        compute_s=graph.delays.compute_s if cut is None else cut,
        post_s=nothing,
        occupied_s=nothing,
        latency_s=nothing,
    )


def _share(spared: Seconds, most: Seconds, dust: float) -> Seconds:
    """What was spared, between nothing and the most that it can be; what is mere rounding is nothing."""
    return np.where(spared > dust, np.minimum(spared, most), 0.0)


def _gaps(graph: StepGraph, times: Times) -> Seconds:
    """The idle time before each action, (actions,)."""
    end, previous = np.array(times.end_s), np.array(graph.wiring.previous)
    return np.maximum(np.array(times.start_s) - np.where(previous >= 0, end[previous], 0.0), 0.0)


def _after(graph: StepGraph, times: Times) -> Seconds:
    """The idle time after each rank's last action, (p,)."""
    last = np.zeros(graph.program.ranks)
    np.maximum.at(last, graph.wiring.rank, np.array(times.end_s))
    return max(times.end_s) - last


def _by_phase(graph: StepGraph, phase: npt.NDArray[np.int64], seconds: Seconds) -> Phased:
    """Sums over the actions of each rank and phase, shape (p, phases)."""
    ranks = graph.program.ranks
    cell = np.array(graph.wiring.rank) * 4 + phase
    return np.asarray(np.bincount(cell, seconds, ranks * 4).reshape(ranks, 4), np.float64)


def _fitted(pieces: dict[tuple[str, str], Seconds], trace: Trace) -> dict[tuple[str, str], Seconds]:
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


def _assembled(graph: StepGraph, pieces: dict[tuple[str, str], Seconds], usual: Seconds) -> Attribution:
    of: dict[str, dict[str, Seconds]] = {}
    for (part, cause), seconds in pieces.items():
        of.setdefault(part, {})[cause] = seconds
    sums = {
        f"{part}_s": np.array([math.fsum(each) for each in zip(*causes.values(), strict=True)])
        for part, causes in of.items()
    }
    return Attribution(
        trace=graph.trace,
        **sums,
        warm_up_of_s=of["warm_up"],
        drain_of_s=of["drain"],
        queueing_s=of["messages"]["queueing"],
        transfer_s=of["messages"]["transfer"],
        latency_s=of["messages"]["latency"],
        messages_knock_on_s=of["messages"]["knock_on"],
        device_knock_on_s=of["device"]["knock_on"],
        usual_s=usual,
        _graph=graph,
    )
