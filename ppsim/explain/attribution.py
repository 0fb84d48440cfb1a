"""Attribution: what each rank waited for in a step; the parts add up to its bubble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.explain.bubble_parts import BubbleParts, split_bubbles
from ppsim.explain.path_and_slack import CriticalPath, path_of, slack_of
from ppsim.explain.step_graph import StepGraph, Wiring
from ppsim.explain.usual_durations import excess_of_rows, usual_of_rows
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]

PARTS = ("warm_up", "drain", "imbalance", "messages", "device", "straggler")


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
    usual_s: shape (rows,), what counted as each row's usual duration. stretched_s: (p,), by how much the rank's own
    computations took longer than `expected`, those that did, in sum; None if nothing was expected. No part of the
    bubble, since the rank is at work: where ranks share cores evenly (`simulate(sharing="fair")`, or an operating
    system) they hardly wait for each other, and it shows here.
    graph: the step with its delays.
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
    stretched_s: Seconds | None = field(repr=False)
    graph: StepGraph = field(repr=False)

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
        return path_of(self.graph)

    @cached_property
    def slack_s(self) -> Seconds:
        """By how much each row could end later without a longer step, shape (rows,); 0 on the critical path."""
        return slack_of(self.graph)[self.trace.program.row_action]

    @property
    def _messages_of_s(self) -> dict[str, Seconds]:
        return {
            "queueing": self.queueing_s,
            "transfer": self.transfer_s,
            "latency": self.latency_s,
            "knock_on": self.messages_knock_on_s,
        }

    def to_frame(self) -> pandas.DataFrame:
        """A row per rank: rank, bubble_s, the six parts, what some of them are made of, stretched_s if there is one."""
        import pandas

        inside = {f"messages_{name}_s": seconds for name, seconds in self._messages_of_s.items()}
        inside["device_knock_on_s"] = self.device_knock_on_s
        for part, causes in (("warm_up", self.warm_up_of_s), ("drain", self.drain_of_s)):
            inside |= {f"{part}_{cause}_s": seconds for cause, seconds in causes.items()}
        parts = {f"{name}_s": part for name, part in self.parts_s.items()}
        columns = {"rank": range(self.trace.ranks), "bubble_s": self.bubble_s, **parts, **inside}
        return pandas.DataFrame(columns if self.stretched_s is None else {**columns, "stretched_s": self.stretched_s})

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
            "stretched_s": None if self.stretched_s is None else self.stretched_s.tolist(),
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
        lines += [f" all  {self.trace.bubble_fraction:>14.2%}{shares}", ""]
        if self.stretched_s is not None:
            stretched = ", ".join(f"{seconds:.6g} s on rank {rank}" for rank, seconds in enumerate(self.stretched_s))
            lines.append(f"computations beyond what was expected: {stretched} (no part of the bubble)")
        lines.append(str(self.critical_path))
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
    `expected` (a cost per stage), what the stage should take, so that a rank slow as a whole is a straggler too. The
    overlap and the scale that the trace was simulated with (its `conditions`) are expected as well, slow_ranks are not.

    Parts add up to `trace.bubble_s` to the last bit or two. Times that cannot be (a message there before it was sent,
    by clocks that disagree) shorten the part they would make negative.

    Raises ValueError if `expected` does not fit the stages, or if rows end before they start or overlap on a rank so
    much that it computes longer than the step lasts. ScheduleError if the schedule could not have run.
    """
    return attributed(trace, None, expected)


def attributed(trace: Trace, wiring: Wiring | None, expected: Sequence[StageCost] | None = None) -> Attribution:
    """`attribute` for who has the wiring of the trace's program already."""
    if expected is not None and len(expected) != trace.schedule.stages:
        raise ValueError(
            f"{len(expected)} expected costs for a schedule of {trace.schedule.stages} stages: give one for each"
        )
    _check_times(trace)
    graph = StepGraph.of(trace, wiring)
    usual = usual_of_rows(trace, expected)
    found = _assembled(graph, split_bubbles(graph, usual), usual)
    if expected is None:
        return found
    excess = excess_of_rows(trace, usual)
    return replace(found, stretched_s=np.bincount(trace.program.rank, excess, trace.ranks).astype(np.float64))


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


def _assembled(graph: StepGraph, parts: BubbleParts, usual: Seconds) -> Attribution:
    of: dict[str, dict[str, Seconds]] = {}
    for (part, cause), seconds in parts.items():
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
        stretched_s=None,
        graph=graph,
    )
