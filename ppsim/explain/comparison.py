"""Comparison: why two steps of one program, one predicted and one measured, took differently long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.explain.attribution import Attribution, attribute
from ppsim.explain.change import explain_change
from ppsim.explain.comparison_text import explanation, length_s, step_names, table
from ppsim.explain.contribution import Contribution, MemoryDifference, contributions, memory_differences
from ppsim.explain.step_graph import StepGraph, on_one_wiring
from ppsim.schedule.order import Order
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What makes a measured step longer than a predicted one. All differences are measured minus predicted.

    Parameters
    ----------
    predicted, measured : Attribution
        Those of the first and of the second step.
    contributions : tuple of Contribution
        Groups whose seconds add up to `difference_s`, largest first. The last is the residual.
    row_s : array of shape (rows,)
        Seconds that the duration of each computation contributes.
    bubbles_s : dict of str to array of shape (p,)
        The difference of each part of the bubble.
    longer_s : array of shape (rows,)
        By how much each computation takes longer, on the critical path or off it.
    memory : tuple of MemoryDifference
        Ranks whose activation bytes differ, and after which action first.

    Notes
    -----
    All edge times (durations, messages, waits for devices) move together, in a straight line, from the predicted step's
    to the measured step's. An edge's change counts for as long as the edge is on the critical path, so contributions
    do not depend on an order (`explain.change`).
    """

    predicted: Attribution = field(repr=False)
    measured: Attribution = field(repr=False)
    contributions: tuple[Contribution, ...]
    row_s: Seconds = field(repr=False)
    bubbles_s: dict[str, Seconds] = field(repr=False)
    longer_s: Seconds = field(repr=False)
    memory: tuple[MemoryDifference, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What words call the two steps: predicted and measured, or first and second if they are something else."""
        return step_names(self.predicted.trace, self.measured.trace)

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
    def dust_s(self) -> float:
        """Seconds below which a difference is taken for rounding."""
        return 1e-11 * max(self.predicted.trace.makespan_s, self.measured.trace.makespan_s)

    @property
    def telling(self) -> list[Contribution]:
        """The contributions that are more than rounding."""
        return [each for each in self.contributions if abs(each.seconds) >= self.dust_s > 0]

    @checked
    def largest_rows(self, count: int = 10, *, by: str = "contribution") -> list[int]:
        """The rows that explain most ("contribution"), or whose durations differ most ("duration"); largest first."""
        if by not in ("contribution", "duration"):
            raise InputError(f'by must be "contribution" or "duration", got {by!r}')
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
                    "predicted_s": length_s(self.predicted.trace, row),
                    "measured_s": length_s(self.measured.trace, row),
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
        return explanation(self)

    def __str__(self) -> str:
        return f"{self.explain()}\n\n{table(self)}"


@checked
def compare(predicted: Trace, measured: Trace) -> Comparison:
    """Say which actions, links and devices make the measured step longer or shorter than the predicted one.

    Parameters
    ----------
    predicted, measured : Trace
        Two traces of one program. Two predictions, or two measurements, will do. What carries the messages, and where
        they are posted, may differ: the time that a message waits for its streams counts with the messages of its link.
        What runs beside computations (collectives, copies) may differ too, and counts with the devices.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the programs differ; the message names the first difference. Also what `attribute` raises.

    Examples
    --------
    >>> import ppsim
    >>> stage = ppsim.StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=4)
    >>> calm, slow = (ppsim.simulate(schedule, [stage] * 2, slow_ranks=ranks) for ranks in ({}, {1: 1.5}))
    >>> found = compare(calm, slow)
    >>> found.difference_s, found.contributions[0].name, found.contributions[0].seconds
    (6.0, 'B of stage 1', 4.0)
    """
    _check_same(predicted, measured)
    attributions = attribute(predicted), attribute(measured)
    graphs = attributions[0].graph, attributions[1].graph
    wiring, before, after = on_one_wiring(*graphs)
    change = explain_change(wiring, before, after)

    program = predicted.program
    longer = (measured.end_s - measured.start_s) - (predicted.end_s - predicted.start_s)
    row_s, inner_s = _rows(graphs, change.compute_s, longer)
    device_s = np.bincount(wiring.rank, change.device_s + inner_s, program.ranks).astype(np.float64)
    found = contributions(program, row_s=row_s, message_s=change.message_s, device_s=device_s)
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
        memory=memory_differences(predicted, measured),
    )


def _rows(graphs: tuple[StepGraph, StepGraph], action_s: Seconds, longer: Seconds) -> tuple[Seconds, Seconds]:
    """Split each action's contribution between its rows and, in an overlapped pair, the gap between them.

    Each gets a share in proportion to how much it changed.
    """
    program = graphs[0].program
    moved = graphs[1].edge_times.compute_s - graphs[0].edge_times.compute_s
    # For what share of the way from the predicted to the measured times the action was on the critical path. Where
    # nothing moved nothing is contributed.
    crossed = np.divide(action_s, moved, out=np.zeros_like(moved), where=moved != 0)
    row_s = crossed[program.row_action] * longer
    return row_s, action_s - np.add.reduceat(row_s, program.action_start[:-1])


def _check_same(one: Trace, other: Trace) -> None:
    first, second = step_names(one, other)
    for name, what in (("ranks", "ranks"), ("microbatches", "microbatches")):
        values = getattr(one.schedule, name), getattr(other.schedule, name)
        if values[0] != values[1]:
            raise InputError(f"the traces are of different programs: {values[0]} {what} and {values[1]}")
    if tuple(one.schedule.placement) != tuple(other.schedule.placement):
        raise InputError(
            f"the traces are of different programs: stages on ranks {list(one.schedule.placement)} and "
            f"{list(other.schedule.placement)}"
        )
    for rank, (mine, its) in enumerate(zip(one.schedule.orders, other.schedule.orders, strict=True)):
        if _are_equal(mine, its):
            continue
        for place, actions in enumerate(zip(mine, its, strict=False)):
            if actions[0] != actions[1]:
                raise InputError(
                    f"the traces are of different programs: action {place} of rank {rank} is {actions[0]} in the "
                    f"{first} and {actions[1]} in the {second} one"
                )
        if len(mine) != len(its):
            raise InputError(
                f"the traces are of different programs: rank {rank} has {len(mine)} actions in the {first} and "
                f"{len(its)} in the {second} one"
            )


def _are_equal(one: Order, other: Order) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("stage", "kind", "microbatch", "joined")
    )
