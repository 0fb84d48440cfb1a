"""Program: the lowered form of a schedule, which both clocks run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ppsim.schedule.deadlock import execution_order
from ppsim.schedule.program_tables import Integers, ProgramTables
from ppsim.schedule.streams import MessageGraph, Streams

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
        if self.written is not None:
            nodes = self.message_graph("link").order
            actions: Integers = nodes[nodes < self.actions]
            return actions
        return execution_order(self)

    def message_graph(self, streams: Streams) -> MessageGraph:
        """What each message waits for on these communicators; made once.

        Raises
        ------
        InputError
            For other streams than "link", "pair" and "rank".
        ScheduleError
            If actions or messages wait for each other in a circle, which the message shows.
        """
        if streams not in self._graphs:
            self._graphs[streams] = MessageGraph.of(self, streams)
        return self._graphs[streams]

    @cached_property
    def _graphs(self) -> dict[Streams, MessageGraph]:
        return {}
