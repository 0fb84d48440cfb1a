"""Comparison: why two steps of one program, one predicted and one measured, took differently long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.action import Kind
from ppsim.explain.attribution import PARTS, Attribution, attribute
from ppsim.explain.change import explain_change
from ppsim.explain.graph import StepGraph, Wiring
from ppsim.program import Program
from ppsim.trace import Trace

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one group of delays adds to the difference in step time; negative where it takes away.

    part: "compute" (a stage's actions of one kind), "messages" (a link's), "device" (how long a rank's actions start
    after everything is there) or "residual" (rounding). Where a field does not apply it is None.
    """

    part: str
    seconds: float
    stage: int | None = None
    kind: str | None = None
    source: int | None = None
    destination: int | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """In words: "F of stage 2", "messages from rank 0 to 1", "device or dispatch on rank 1"."""
        if self.part == "compute":
            return f"{self.kind} of stage {self.stage}"
        if self.part == "messages":
            return f"messages from rank {self.source} to {self.destination}"
        return f"device or dispatch on rank {self.rank}" if self.part == "device" else "rounding"


@dataclass(frozen=True, kw_only=True)
class MemoryDifference:
    """The first computation in a rank's order after which it holds different activation bytes in the two traces."""

    rank: int
    row: int
    action: str
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """measured minus predicted, always.

    contributions: groups whose seconds add up to difference_s, largest first; the last is the residual. row_s: shape
    (rows,), what each computation's own duration contributes. bubbles_s: for each part of the bubble its difference,
    shape (p,). longer_s: shape (rows,), by how much each computation takes longer, critical or not. memory: ranks whose
    activation bytes differ, at the first place.

    How: all delays (durations, messages, waits for devices) move together in a straight line from the predicted step's
    to the measured one's. What changes while it is on the critical path makes the step longer by as much; what is off
    it does not (`explain.change`). So contributions need no order, and a change that only takes up slack counts
    nothing.
    """

    predicted: Attribution = field(repr=False)
    measured: Attribution = field(repr=False)
    contributions: tuple[Contribution, ...]
    row_s: Seconds = field(repr=False)
    bubbles_s: dict[str, Seconds] = field(repr=False)
    longer_s: Seconds = field(repr=False)
    memory: tuple[MemoryDifference, ...]

    @property
    def difference_s(self) -> float:
        """The measured makespan minus the predicted."""
        return self.measured.trace.makespan_s - self.predicted.trace.makespan_s

    @property
    def residual_s(self) -> float:
        """What no group accounts for: rounding."""
        return next(each.seconds for each in self.contributions if each.part == "residual")

    @property
    def parts_s(self) -> dict[str, float]:
        """The contributions by part; the values add up to difference_s."""
        return {
            part: math.fsum(each.seconds for each in self.contributions if each.part == part)
            for part in ("compute", "messages", "device", "residual")
        }

    @property
    def _dust_s(self) -> float:
        """What is shorter is rounding."""
        return 1e-11 * max(self.predicted.trace.makespan_s, self.measured.trace.makespan_s)

    @property
    def _telling(self) -> list[Contribution]:
        return [each for each in self.contributions if abs(each.seconds) >= self._dust_s > 0]

    def largest_rows(self, count: int = 10, *, by: str = "contribution") -> list[int]:
        """The rows that explain most ("contribution"), or whose durations differ most ("duration"); largest first."""
        if by not in ("contribution", "duration"):
            raise ValueError(f'by must be "contribution" or "duration", got {by!r}')
        amounts = self.row_s if by == "contribution" else self.longer_s
        order = np.argsort(-np.abs(amounts), kind="stable")[:count]
        return [int(row) for row in order if amounts[row] != 0]

    def to_frame(self) -> pandas.DataFrame:
        """A row per contribution: part, name, stage, kind, source, destination, rank, seconds, share_of_step."""
        import pandas

        step_s = self.predicted.trace.makespan_s
        columns = ("part", "name", "stage", "kind", "source", "destination", "rank", "seconds")
        frame = pandas.DataFrame({name: [getattr(each, name) for each in self.contributions] for name in columns})
        for name in ("stage", "source", "destination", "rank"):
            frame[name] = frame[name].astype("Int64")
        return frame.assign(share_of_step=frame["seconds"] / step_s if step_s > 0 else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        program = self.predicted.trace.program
        predicted_s, measured_s = self.predicted.trace.makespan_s, self.measured.trace.makespan_s

        def rows(by: str) -> list[dict[str, Any]]:
            return [
                {
                    "action": str(program.action_of(row)),
                    "rank": int(program.rank[row]),
                    "predicted_s": _length(self.predicted.trace, row),
                    "measured_s": _length(self.measured.trace, row),
                    "contribution_s": float(self.row_s[row]),
                }
                for row in self.largest_rows(by=by)
            ]

        return {
            "predicted_makespan_s": predicted_s,
            "measured_makespan_s": measured_s,
            "difference_s": self.difference_s,
            "parts_s": self.parts_s,
            "contributions": [
                {
                    "part": each.part,
                    "name": each.name,
                    **{
                        name: value
                        for name in ("stage", "kind", "source", "destination", "rank")
                        if (value := getattr(each, name)) is not None
                    },
                    "seconds": each.seconds,
                }
                for each in self.contributions
            ],
            "bubble_parts_s": {name: seconds.tolist() for name, seconds in self.bubbles_s.items()},
            "actions_that_explain": rows("contribution"),
            "actions_that_differ": rows("duration"),
            "memory": [
                {
                    "rank": each.rank,
                    "action": each.action,
                    "predicted_bytes": each.predicted_bytes,
                    "measured_bytes": each.measured_bytes,
                }
                for each in self.memory
            ],
            "explanation": self.explain(),
        }

    def explain(self) -> str:
        """The comparison in plain sentences."""
        program = self.predicted.trace.program
        predicted_s, measured_s = self.predicted.trace.makespan_s, self.measured.trace.makespan_s
        tells = abs(self.difference_s) >= self._dust_s > 0
        if not tells:
            lines = [f"Both steps take {_time(predicted_s)}."]
        else:
            word = "longer" if self.difference_s > 0 else "shorter"
            share = f" ({self.difference_s / predicted_s:+.2%})" if predicted_s > 0 else ""
            lines = [
                f"The measured step takes {_time(measured_s)}, {_time(abs(self.difference_s))} {word} than the "
                f"predicted {_time(predicted_s)}{share}."
            ]
        named = [each for each in self._telling if each.part != "residual"][:_SHOWN]
        if named and tells:
            parts = {part: seconds for part, seconds in self.parts_s.items() if part != "residual"}
            sums = ", ".join(
                f"{_PART_NAMES[part]} {_signed(0.0 if abs(seconds) < self._dust_s else seconds)}"
                for part, seconds in parts.items()
            )
            lines.append(f"On the critical path: {sums}.")
            lines.append("Most of it: " + "; ".join(f"{each.name} {_signed(each.seconds)}" for each in named) + ".")
        longest = [row for row in self.largest_rows(3) if abs(self.row_s[row]) >= self._dust_s]
        if longest and tells:
            told = [
                f"{program.action_of(row)} ({_time(_length(self.predicted.trace, row))} predicted, "
                f"{_time(_length(self.measured.trace, row))} measured, {_signed(float(self.row_s[row]))} of the step)"
                for row in longest
            ]
            lines.append(f"Actions that explain most: {'; '.join(told)}.")
        moved = {name: math.fsum(seconds) / program.ranks for name, seconds in self.bubbles_s.items()}
        most = sorted((name for name in PARTS if abs(moved[name]) >= self._dust_s), key=lambda name: -abs(moved[name]))[
            :3
        ]
        if most and tells:
            told = [f"{name.replace('_', '-')} {_signed(moved[name])}" for name in most]
            lines.append(f"The bubble of a rank, on average: {', '.join(told)}.")
        for each in self.memory:
            lines.append(
                f"Activation bytes on rank {each.rank} differ from {each.action} on: {each.predicted_bytes:,} "
                f"predicted, {each.measured_bytes:,} measured."
            )
        if not self.memory:
            lines.append("Activation bytes are equal after every action.")
        return "\n".join(lines)

    def __str__(self) -> str:
        width = max(len("measured - predicted"), *(len(each.name) for each in self._telling), 0)
        step_s = self.predicted.trace.makespan_s
        lines = [self.explain(), "", f"{'what':<{width}}  {'seconds':>13}  {'of the step':>11}"]
        for each in self._telling:
            share = each.seconds / step_s if step_s > 0 else 0.0
            lines.append(f"{each.name:<{width}}  {each.seconds:>+13.6g}  {share:>+11.2%}")
        share = self.difference_s / step_s if step_s > 0 else 0.0
        lines.append(f"{'measured - predicted':<{width}}  {self.difference_s:>+13.6g}  {share:>+11.2%}")
        lines += ["", "rank" + "".join(f"  {name.replace('_', '-') + ' (s)':>15}" for name in PARTS)]
        for rank, row in enumerate(zip(*(self.bubbles_s[name].tolist() for name in PARTS), strict=True)):
            lines.append(f"{rank:>4}" + "".join(f"  {seconds:>+15.6g}" for seconds in row))
        return "\n".join(lines)


_PART_NAMES = {"compute": "computations", "messages": "messages", "device": "device or dispatch"}


def compare(predicted: Trace, measured: Trace) -> Comparison:
    """Say which actions, links and devices make the measured step longer or shorter than the predicted one.

    Any two traces of one program will do, such as two predictions. Raises ValueError that names the first difference
    if the programs differ, and what `attribute` raises.
    """
    _check_same(predicted.program, measured.program)
    attributions = attribute(predicted), attribute(measured)
    wiring = Wiring.of(predicted.program)
    graphs = [StepGraph.of(trace, wiring) for trace in (predicted, measured)]
    change = explain_change(wiring, graphs[0].delays, graphs[1].delays)

    program, messages = predicted.program, predicted.program.messages
    longer = (measured.end_s - measured.start_s) - (predicted.end_s - predicted.start_s)
    row_s, inner_s = _rows(graphs, change.compute_s, longer)
    device = np.bincount(wiring.rank, change.device_s + inner_s, program.ranks)
    found = [
        *(
            Contribution(part="compute", stage=stage, kind=Kind(kind).name, seconds=seconds)
            for (stage, kind), seconds in _sums(program.stage, program.kind, row_s)
        ),
        *(
            Contribution(part="messages", source=source, destination=destination, seconds=seconds)
            for (source, destination), seconds in _sums(messages.source, messages.destination, change.message_s)
        ),
        *(Contribution(part="device", rank=rank, seconds=seconds) for rank, seconds in enumerate(device.tolist())),
    ]
    found.sort(key=lambda each: -abs(each.seconds))
    difference_s = measured.makespan_s - predicted.makespan_s
    rest = math.fsum([difference_s, *(-each.seconds for each in found)])
    return Comparison(
        predicted=attributions[0],
        measured=attributions[1],
        contributions=(*found, Contribution(part="residual", seconds=rest)),
        row_s=row_s,
        bubbles_s={
            name: attributions[1].parts_s[name] - attributions[0].parts_s[name] for name in attributions[0].parts_s
        },
        longer_s=longer,
        memory=_memory(predicted, measured),
    )


def _check_same(one: Program, other: Program) -> None:
    for name, what in (("ranks", "ranks"), ("microbatches", "microbatches")):
        values = getattr(one.schedule, name), getattr(other.schedule, name)
        if values[0] != values[1]:
            raise ValueError(f"the traces are of different programs: {values[0]} {what} and {values[1]}")
    if tuple(one.schedule.placement) != tuple(other.schedule.placement):
        raise ValueError(
            f"the traces are of different programs: stages on ranks {list(one.schedule.placement)} and "
            f"{list(other.schedule.placement)}"
        )
    for rank, (mine, its) in enumerate(zip(one.schedule.orders, other.schedule.orders, strict=True)):
        for place, actions in enumerate(zip(mine, its, strict=False)):
            if actions[0] != actions[1]:
                raise ValueError(
                    f"the traces are of different programs: action {place} of rank {rank} is {actions[0]} in the "
                    f"predicted and {actions[1]} in the measured one"
                )
        if len(mine) != len(its):
            raise ValueError(
                f"the traces are of different programs: rank {rank} has {len(mine)} actions in the predicted and "
                f"{len(its)} in the measured one"
            )


def _rows(graphs: list[StepGraph], action_s: Seconds, longer: Seconds) -> tuple[Seconds, Seconds]:
    """An action's contribution dealt to its rows, and to the time between them, as each one changed."""
    program = graphs[0].program
    moved = graphs[1].delays.compute_s - graphs[0].delays.compute_s
    # The share of the critical path that crossed the action; where nothing moved nothing is contributed.
    crossed = np.divide(action_s, moved, out=np.zeros_like(moved), where=moved != 0)
    row_s = crossed[program.row_action] * longer
    return row_s, action_s - np.add.reduceat(row_s, program.action_start[:-1])


def _sums(
    first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], seconds: Seconds
) -> list[tuple[tuple[int, int], float]]:
    """Sums over equal pairs of keys, by ascending pair."""
    if not len(first):
        return []
    pairs, index = np.unique(np.stack([first, second], axis=1), axis=0, return_inverse=True)
    sums = np.bincount(index.reshape(-1), seconds, len(pairs))
    return [((int(a), int(b)), float(total)) for (a, b), total in zip(pairs.tolist(), sums.tolist(), strict=True)]


def _memory(predicted: Trace, measured: Trace) -> tuple[MemoryDifference, ...]:
    program, found = predicted.program, []
    for rank in range(program.ranks):
        rows = np.array(program.rows_of(rank), np.int64)
        differs = rows[predicted.activation_bytes[rows] != measured.activation_bytes[rows]]
        if len(differs):
            row = int(differs[0])
            found.append(
                MemoryDifference(
                    rank=rank,
                    row=row,
                    action=str(program.action_of(row)),
                    predicted_bytes=int(predicted.activation_bytes[row]),
                    measured_bytes=int(measured.activation_bytes[row]),
                )
            )
    return tuple(found)


def _length(trace: Trace, row: int) -> float:
    return float(trace.end_s[row] - trace.start_s[row])


def _time(seconds: float) -> str:
    size = float(f"{abs(seconds):.4g}")
    scale, unit = (1.0, "s") if size >= 1 or size == 0 else (1e3, "ms") if size >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.4g} {unit}"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{_time(abs(seconds))}"
