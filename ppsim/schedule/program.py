"""Program: the lowered form of a schedule, which both clocks run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ppsim.checks import checked
from ppsim.schedule.action import Kind
from ppsim.schedule.deadlock import Circle, execution_order, find_circle
from ppsim.schedule.program_tables import Integers, ProgramTables
from ppsim.schedule.side_table import SideTable
from ppsim.schedule.streams import MessageGraph, Streams, circle_of_posts

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

    def is_posted(self, streams: Streams) -> bool:
        """Whether messages wait for posts or communicators; else each leaves as it is made, on a link of its own."""
        return streams != "link" or self.written is not None

    @checked
    def find_circle(self, streams: Streams = "link") -> Circle | None:
        """The circle in which actions and messages wait for each other on these communicators; None if all can run."""
        return circle_of_posts(self, streams) if self.is_posted(streams) else find_circle(self)

    @checked
    def message_graph(self, streams: Streams) -> MessageGraph:
        """What each message waits for on these communicators; made once.

        Parameters
        ----------
        streams : "link", "pair" or "rank"
            Who has a communicator.

        Returns
        -------
        MessageGraph

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
    def first_gradient_row(self) -> Integers:
        """The row of each stage's first B or W, its first gradients of weights, shape (stages,); -1 for none."""
        return self._last_by_stage(self._gradient_rows[::-1])

    @cached_property
    def last_gradient_row(self) -> Integers:
        """The row of each stage's last B or W, which completes its gradients, shape (stages,); -1 for none."""
        return self._last_by_stage(self._gradient_rows)

    @property
    def _gradient_rows(self) -> Integers:
        return np.flatnonzero((self.kind == Kind.B) | (self.kind == Kind.W))

    def _last_by_stage(self, rows: Integers) -> Integers:
        """Of some rows the last of each stage, which is on one rank; shape (stages,), -1 for none."""
        found = np.full(self.schedule.stages, -1)
        found[self.stage[rows]] = rows  # of several the last to be written stays
        return found

    @cached_property
    def collectives(self) -> SideTable:
        """What runs on the collective streams; nothing where the schedule states no sharding."""
        sharding = self.schedule.sharding
        return SideTable.none() if sharding is None else SideTable.of(self, sharding, None)

    @cached_property
    def offload(self) -> SideTable:
        """What runs on the streams of copies; nothing where the schedule states no offloading."""
        offload = self.schedule.offload
        return SideTable.none() if offload is None else SideTable.of(self, None, offload)

    def beside(self, *, sharded: bool) -> SideTable:
        """All that runs beside computations: copies, and collectives if parameters are `sharded`."""
        if not sharded:
            return self.offload
        if not len(self.offload.stage):
            return self.collectives
        return SideTable.of(self, self.schedule.sharding, self.schedule.offload)

    @cached_property
    def _graphs(self) -> dict[Streams, MessageGraph]:
        return {}
