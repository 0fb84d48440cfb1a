"""Placements: one order of computations with its receives posted in different places, on different communicators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import torch.distributed.pipelining.schedules as torch_schedules

import ppsim
from ppexec.config.config import RunConfig
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool
from ppsim import Network, Schedule, ScheduleError, StageCost
from ppsim.schedule.streams import Streams

STREAMS: tuple[Streams, ...] = get_args(Streams)


@dataclass(frozen=True, kw_only=True)
class PlacementRow:
    """One placement on one kind of communicator.

    Parameters
    ----------
    case, place : str
        Whose order, and where its receives stand.
    streams : str
        Who has a communicator.
    predicted_s : float or None
        Step time; None if it hangs.
    waits_s : float or None
        Of that, what the ranks wait for streams on average.
    measured_s : float or None
        The median of real steps; None if none was run.
    why : str
        Who waits for whom where it hangs, or why PyTorch's runtime could not run it.
    """

    case: str
    place: str
    streams: str
    predicted_s: float | None = None
    waits_s: float | None = None
    measured_s: float | None = None
    why: str = ""

    @property
    def cells(self) -> dict[str, str]:
        """The row for a table."""
        return {
            "case": self.case,
            "receives": self.place,
            "communicator of each": self.streams,
            "predicted": "HANGS" if self.predicted_s is None else f"{self.predicted_s * 1e3:.1f} ms",
            "waits for streams": "" if self.waits_s is None else f"{self.waits_s * 1e3:.1f} ms",
            "measured": "" if self.measured_s is None else f"{self.measured_s * 1e3:.1f} ms",
        }


def placements(schedule: Schedule) -> dict[str, Schedule | str]:
    """The schedule with its receives in each place; a sentence where they cannot stand there."""
    found: dict[str, Schedule | str] = {
        "posted ahead": schedule.with_communication("derived"),
        "when sent": schedule.with_communication("early"),
        "at use": schedule.with_communication("late"),
    }
    if hasattr(torch_schedules, "_defer_recv_ops"):  # from torch 2.13 on
        try:
            found["deferred by PyTorch"] = deferred_by_torch(schedule)
        except ScheduleError as error:
            found["deferred by PyTorch"] = str(error)
    return found


def deferred_by_torch(schedule: Schedule) -> Schedule:
    """The schedule with receives where PyTorch's own two passes put them.

    Raises
    ------
    ScheduleError
        Where a link's receives would stand in another order than its sends, so that each brings a wrong tensor.
    """
    passes = cast(Any, torch_schedules)
    orders = {
        rank: [passes._Action.from_str(str(action)) for action in order] for rank, order in enumerate(schedule.orders)
    }
    sent = passes._add_send_recv(orders, schedule.placement.__getitem__, schedule.stages)
    rows = passes._defer_recv_ops(sent, schedule.placement.__getitem__)
    text = "\n".join(",".join(map(str, rows[rank])) for rank in range(schedule.ranks))
    return Schedule.from_csv(text, name=schedule.name, copies=schedule.copies)


def predict_placements(
    case: str, schedule: Schedule, stages: Sequence[StageCost], network: Network
) -> Iterator[tuple[PlacementRow, Schedule | None]]:
    """Check and simulate each placement on each kind of communicator.

    Parameters
    ----------
    case : str
        What the rows are called.
    schedule : Schedule
        The order of computations.
    stages : sequence of StageCost
        One for each stage.
    network : Network
        What messages take.

    Yields
    ------
    PlacementRow, Schedule or None
        The row, and the schedule where it runs.
    """
    for place, placed in placements(schedule).items():
        for streams in STREAMS:
            if isinstance(placed, str):
                yield PlacementRow(case=case, place=place, streams=streams, why=placed), None
                continue
            if place == "posted ahead" and streams != "link":
                continue  # receives that stand nowhere stand at their use there
            try:
                trace = ppsim.simulate(placed, stages, network=network, streams=streams)
            except ScheduleError as error:
                yield PlacementRow(case=case, place=place, streams=streams, why=str(error)), None
                continue
            found = ppsim.attribute(trace)
            waits_s = found.fractions["streams"] * trace.makespan_s
            row = PlacementRow(
                case=case, place=place, streams=streams, predicted_s=trace.makespan_s, waits_s=float(waits_s)
            )
            yield row, placed


def measured(
    row: PlacementRow, schedule: Schedule, config: RunConfig, stages: Sequence[StageCost], pool: WorkerPool
) -> PlacementRow:
    """The row with the median of real steps, whose actions wait as long as their costs say."""
    with Session(config, pool=pool, costs=stages) as session:
        steps_s = [trace.makespan_s for trace in session.measure(config.steps)]
    return replace(row, measured_s=float(np.median(steps_s)))
