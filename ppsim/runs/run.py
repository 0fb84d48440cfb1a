"""Run: the measured steps of one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ppsim.checks import check_fields
from ppsim.errors import InputError
from ppsim.schedule.schedule import Schedule
from ppsim.shown import shown_by
from ppsim.trace.trace import Trace, median_step


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The steps of one job, each measured, all of one schedule.

    Parameters
    ----------
    traces : sequence of Trace
        One for each step.
    steps : sequence of int
        The number of each step in the job.
    environment : dict
        What the files say of the job, and how they were read; JSON values.
    source : str
        Where it was read from.

    Raises
    ------
    InputError
        If there is no step, if two have other schedules, or if a schedule has several copies of the model.
    """

    traces: Sequence[Trace]
    steps: Sequence[int]
    environment: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "traces", tuple(self.traces))
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.traces or len(self.traces) != len(self.steps):
            raise InputError(
                f"{len(self.traces)} traces for {len(self.steps)} steps: give one for each, and at least one"
            )
        if self.schedule.copies > 1:
            raise InputError(
                f"{self.schedule.name} has {self.schedule.copies} copies of the model: a run is of one, so look at its "
                "traces one by one"
            )
        for step, trace in zip(self.steps, self.traces, strict=True):
            if trace.schedule.orders != self.schedule.orders:
                rank = (
                    next(
                        rank for rank in range(self.ranks) if trace.schedule.orders[rank] != self.schedule.orders[rank]
                    )
                    if trace.ranks == self.ranks
                    else 0
                )
                raise InputError(
                    f"step {step} runs another order on rank {rank} than step {self.steps[0]}: read steps of one "
                    "schedule at a time"
                )

    @property
    def schedule(self) -> Schedule:
        """What every step ran."""
        return self.traces[0].schedule

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks, p."""
        return self.schedule.ranks

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known of its steps, in words: of the traces, and what the reader of the files says besides."""
        return (*self.traces[0].unknown, *self.environment.get("unknown", ()))

    @property
    def median(self) -> Trace:
        """The step of the median makespan; of two in the middle the shorter."""
        return median_step(self.traces)

    def _repr_html_(self) -> str:
        return str(shown_by("run_html", self))

    def only(self, steps: Sequence[int]) -> Run:
        """The run with these steps alone. Raises InputError for steps that it does not have."""
        by_step = dict(zip(self.steps, self.traces, strict=True))
        missing = [step for step in steps if step not in by_step]
        if missing:
            raise InputError(f"there is no step {missing[0]}: the run has {', '.join(map(str, self.steps))}")
        return Run(
            traces=[by_step[step] for step in steps], steps=steps, environment=self.environment, source=self.source
        )
