"""Attribution: what each rank waited for in a step; the parts add up to its bubble."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.costs.by_microbatch import StageCosts, costs_of_copies
from ppsim.errors import InputError
from ppsim.explain.bubble_parts import BubbleParts, split_bubbles
from ppsim.explain.path_and_slack import CriticalPath, path_of, slack_of
from ppsim.explain.step_graph import INFERRED, StepGraph
from ppsim.explain.usual_durations import excess_of_rows, usual_of_rows
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]

PARTS = ("warm_up", "drain", "imbalance", "messages", "streams", "collectives", "copies", "device", "straggler")


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """The bubble of each rank in nine parts, each an array of seconds of shape (p,), none negative.

        rank 0  F0 F1 F2 F3 w  w  w  w  w  w  B0 B1 B2 B3          w  warm-up: waiting for the first backward
        rank 1  w  F0 F1 F2 F3 w  w     B0 B1 B2 B3  d             w  warm-up: before the first action
        rank 2  w  w  F0 F1 F2 F3 B0 B1 B2 B3  d  d                d  drain: after the last action

    Parameters
    ----------
    trace : Trace
        The step.
    warm_up_s : array of shape (p,)
        All waiting before the rank's first action. From then to its first backward, the waiting for computation that
        the order causes even with equal stages and free messages: the pipeline fills.
    drain_s : array of shape (p,)
        All waiting after its last action. After its last forward, the waiting for computation that the order causes
        even with equal stages and free messages: the pipeline empties. For a rank without actions, the whole step.
    imbalance_s : array of shape (p,)
        Other waiting for another rank's computation: stages take unequally long, or the order does not suit them.
    messages_s : array of shape (p,)
        Waiting while a message is queued on its link, in transfer or in its latency, and the waiting for computation
        that messages made late (`messages_knock_on_s`).
    streams_s : array of shape (p,)
        Waiting for a message that was made and whose link was free, and that had not set off: its send or its receive
        was not posted yet, or a communicator had to carry something else before (head-of-line blocking). Also the
        waiting for computation that such waits elsewhere made late (`streams_knock_on_s`). It is 0 where every link has
        a communicator and the schedule states no communication.
    collectives_s : array of shape (p,)
        Waiting until a stage's parameters are gathered, when all else is there, and the waiting for computation that
        such waits elsewhere made late (`collectives_knock_on_s`). It is 0 unless parameters are sharded. Where a rank
        does nothing else while it reduces gradients (`Conditions.blocking`), the waiting for that too.
    copies_s : array of shape (p,)
        Waiting until activations are back from host memory, when all else is there, and the waiting for computation
        that such waits elsewhere made late (`copies_knock_on_s`). It is 0 unless activations are offloaded. Where a
        rank does nothing else while it copies (`Conditions.blocking`), the waiting for copies in both directions.
    device_s : array of shape (p,)
        Waiting though inputs are there and the rank is free, and the waiting for computation that such waits elsewhere
        made late (`device_knock_on_s`). In a simulation a shared device is busy, or dispatching takes its stated time.
        In a measurement it is the executor's and the machine's own time from one action to the next.
    straggler_s : array of shape (p,)
        Waiting for computation that is late because actions took longer than usual, here or further up the pipeline.
    warm_up_of_s, drain_of_s : mapping of str to array of shape (p,)
        These two parts by cause: "compute", "messages", "streams", "collectives", "copies", "device", "straggler". No
        faster link or device shortens "compute".
    queueing_s, transfer_s, latency_s, messages_knock_on_s : arrays of shape (p,)
        What `messages_s` is made of. A measured message is all transfer.
    streams_knock_on_s, collectives_knock_on_s, copies_knock_on_s, device_knock_on_s : arrays of shape (p,)
        Parts of `streams_s`, `collectives_s`, `copies_s` and `device_s`.
    usual_s : array of shape (rows,)
        What each row usually takes.
    stretched_s : array of shape (p,), or None
        By how much the rank's computations that took longer than `expected` did so, in sum. None if nothing was
        expected. It is no part of the bubble, since the rank is at work. Ranks that share cores evenly show it: they
        hardly wait for each other, but all compute more slowly.
    graph : StepGraph
        The step with its edge times.

    Notes
    -----
    With equal stages and free messages there is nothing but warm-up and drain. AFAB has
    warm_up_s[r] = r F + (p - 1 - r)(F + B) and drain_s[r] = r B. 1F1B with m >= p has
    warm_up_s[r] = r F + (p - 1 - r) B and drain_s[r] = r B + (p - 1 - r) F.

    A wait is followed to its root: if a rank waits for a rank that waits for a message, both wait for the message.
    """

    trace: Trace = field(repr=False)
    warm_up_s: Seconds
    drain_s: Seconds
    imbalance_s: Seconds
    messages_s: Seconds
    streams_s: Seconds
    collectives_s: Seconds
    copies_s: Seconds
    device_s: Seconds
    straggler_s: Seconds
    warm_up_of_s: Mapping[str, Seconds] = field(repr=False)
    drain_of_s: Mapping[str, Seconds] = field(repr=False)
    queueing_s: Seconds = field(repr=False)
    transfer_s: Seconds = field(repr=False)
    latency_s: Seconds = field(repr=False)
    messages_knock_on_s: Seconds = field(repr=False)
    streams_knock_on_s: Seconds = field(repr=False)
    collectives_knock_on_s: Seconds = field(repr=False)
    copies_knock_on_s: Seconds = field(repr=False)
    device_knock_on_s: Seconds = field(repr=False)
    usual_s: Seconds = field(repr=False)
    stretched_s: Seconds | None = field(repr=False)
    graph: StepGraph = field(repr=False)

    @property
    def parts_s(self) -> dict[str, Seconds]:
        """The nine parts by name, each of shape (p,); their sum is `bubble_s`."""
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
    @checked
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
        """A row per rank: rank, bubble_s, the nine parts, what some are made of, stretched_s if there is one."""
        import pandas

        inside = {f"messages_{name}_s": seconds for name, seconds in self._messages_of_s.items()}
        inside |= {
            f"{name}_knock_on_s": getattr(self, f"{name}_knock_on_s")
            for name in ("streams", "collectives", "copies", "device")
        }
        for part, causes in (("warm_up", self.warm_up_of_s), ("drain", self.drain_of_s)):
            inside |= {f"{part}_{cause}_s": seconds for cause, seconds in causes.items()}
        parts = {f"{name}_s": part for name, part in self.parts_s.items()}
        columns = {"rank": range(self.trace.ranks), "bubble_s": self.bubble_s, **parts, **inside}
        return pandas.DataFrame(columns if self.stretched_s is None else {**columns, "stretched_s": self.stretched_s})

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, for JSON; the critical path by what it is made of and segment by segment."""
        return {
            "clock": self.trace.clock,
            "messages_known": self.trace.message_times_s is not None,
            "makespan_s": self.trace.makespan_s,
            "bubble_s": self.bubble_s.tolist(),
            "bubble_fraction": self.trace.bubble_fraction,
            **{f"{name}_s": part.tolist() for name, part in self.parts_s.items()},
            "fractions": self.fractions,
            "messages_of_s": {name: seconds.tolist() for name, seconds in self._messages_of_s.items()},
            "streams_knock_on_s": self.streams_knock_on_s.tolist(),
            "collectives_knock_on_s": self.collectives_knock_on_s.tolist(),
            "copies_knock_on_s": self.copies_knock_on_s.tolist(),
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
        if self.trace.message_times_s is None:
            lines.append(f"messages were not recorded: {INFERRED}")
        lines.append(str(self.critical_path))
        return "\n".join(lines)


@checked
def attribute(trace: Trace, *, expected: StageCosts | None = None) -> Attribution:
    """Split each rank's bubble by what the rank waited for; from a simulated and a measured trace alike.

    Parameters
    ----------
    trace : Trace
        A step.
    expected : sequence of StageCost, or of sequences of StageCost, shape (stages,), optional
        What the stages should take, which then counts as usual. So a rank that is slow as a whole is a straggler too.
        The overlap and the scale that the trace was simulated with are expected as well, slow ranks are not. By default
        the usual duration is the median of the same stage and kind in this trace, with overlapped pairs apart.

    Returns
    -------
    Attribution
        Its parts add up to `trace.bubble_s`, to the last bit or two.

    Raises
    ------
    InputError
        If `expected` does not fit the stages, if rows end before they start, or if they overlap on a rank so much that
        it computes longer than the step lasts.
    ScheduleError
        If the schedule could not have run.

    Notes
    -----
    The times show, moment by moment, whether a rank waits for computation, a message, a stream, parameters, activations
    or a device (see `explain.waits`). To find out why computation was late, the step is replayed without one cause
    after another:

    1. Actions take no longer than usual. What this saves is the straggler's.
    2. No message waits for a post or a communicator. It still queues behind the messages ahead on its link.
    3. Messages cost nothing.
    4. No action waits for parameters.
    5. No action waits for activations.
    6. No action waits for a device.
    7. All stages take equally long. What this saves is imbalance, what is left is the pipeline's filling and emptying.

    Each is counted before a rank's first backward, after its last forward, and between, and is no more than the rank's
    waiting for computation there. Where clocks disagree (a message arrives before it was sent) the part that would be
    negative is shortened to nothing.

    Where messages were not recorded, they are inferred from when their receivers began (`StepGraph.of`). Then
    "messages" cannot be told from what a rank does itself before an action for which it had to wait.

    Examples
    --------
    >>> import ppsim
    >>> stage = ppsim.StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> trace = ppsim.simulate(ppsim.build_schedule("afab", ranks=2, microbatches=4), [stage] * 2)
    >>> found = attribute(trace)
    >>> found.warm_up_s.tolist(), found.drain_s.tolist(), trace.bubble_s.tolist()
    ([3.0, 1.0], [0.0, 2.0], [3.0, 3.0])
    """
    if expected is not None:
        schedule = trace.schedule
        expected = costs_of_copies(expected, schedule.copies, schedule.stages, noun="expected costs")
    _check_times(trace)
    graph = StepGraph.of(trace)
    usual = usual_of_rows(trace, expected)
    found = _assembled(graph, split_bubbles(graph, usual), usual)
    if expected is None:
        return found
    excess = excess_of_rows(trace, usual)
    return replace(found, stretched_s=np.bincount(trace.program.rank, excess, trace.ranks).astype(np.float64))


@checked
def critical_path(trace: Trace) -> CriticalPath:
    """The chain of computations, messages and gaps that is as long as the step.

    Raises
    ------
    InputError
        If the trace's times have no meaning, as in `attribute`.

    Examples
    --------
    >>> import ppsim
    >>> stage = ppsim.StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> trace = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=2), [stage] * 2)
    >>> path = critical_path(trace)
    >>> path.length_s, [path.label(segment) for segment in path.segments if segment.what == "compute"][:2]
    (9.0, ['0F0 on rank 0', '1F0 on rank 1'])
    """
    _check_times(trace)
    return path_of(StepGraph.of(trace))


def _check_times(trace: Trace) -> None:
    for name in ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s"):
        times_s = getattr(trace, name)
        if times_s is not None and not np.isfinite(times_s).all():
            raise InputError(f"the trace's {name} holds a time that is no finite number: record every row and message")
    backward = trace.end_s < trace.start_s
    if backward.any():
        row = int(np.argmax(backward))
        raise InputError(
            f"{trace.program.action_of(row)} ends at {trace.end_s[row]!r} s, before its start at "
            f"{trace.start_s[row]!r} s: record both on the rank's own clock"
        )
    too_busy = trace.bubble_s < -1e-9 * trace.makespan_s
    if too_busy.any():
        rank = int(np.argmax(too_busy))
        raise InputError(
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
        queueing_s=of["messages"]["queue"],
        transfer_s=of["messages"]["transfer"],
        latency_s=of["messages"]["latency"],
        messages_knock_on_s=of["messages"]["knock_on"],
        streams_knock_on_s=of["streams"]["knock_on"],
        collectives_knock_on_s=of["collectives"]["knock_on"],
        copies_knock_on_s=of["copies"]["knock_on"],
        device_knock_on_s=of["device"]["knock_on"],
        usual_s=usual,
        stretched_s=None,
        graph=graph,
    )
