"""Program: the lowered form of a schedule, which both clocks run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ppsim.schedule.deadlock import execution_order
from ppsim.schedule.program_tables import Integers, ProgramTables

if TYPE_CHECKING:
    from ppsim.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Program(ProgramTables):
    """The tables of a schedule, and the schedule itself. Made by `Schedule.program`.

    Parameters
    ----------
    schedule : Schedule
        What was lowered. All other fields are those of `ProgramTables`.
    """

    schedule: Schedule

    @cached_property
    def execution_order(self) -> Integers:
        """All actions in one sequence in which each comes after everything it needs, shape (actions,).

        That such a sequence exists proves that the program ends.

        Raises
        ------
        ScheduleError
            If some actions wait for each other in a circle, which the message shows.
        """
        return execution_order(self)
