"""Plan: all orders as rectangular arrays, as the compiled kernels read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.schedule.order import Order
from ppsim.schedule.schedule import Schedule
from ppsim.search.plan_clock import objective_of, peak_of_rank, run_plan
from ppsim.search.problem import Integers, Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One order per rank. kind, stage, microbatch, joined: (p, A); length: (p,), how many entries of a row count."""

    kind: npt.NDArray[np.int8]
    stage: npt.NDArray[np.int32]
    microbatch: npt.NDArray[np.int32]
    joined: npt.NDArray[np.bool_]
    length: Integers

    @classmethod
    def empty(cls, problem: Problem) -> Plan:
        """Room for F, I and W of everything."""
        shape = (problem.ranks, 3 * problem.stages_per_rank * problem.microbatches)
        return cls(
            kind=np.zeros(shape, np.int8),
            stage=np.zeros(shape, np.int32),
            microbatch=np.zeros(shape, np.int32),
            joined=np.zeros(shape, np.bool_),
            length=np.zeros(problem.ranks, np.int64),
        )

    @classmethod
    def of(cls, schedule: Schedule, problem: Problem) -> Plan:
        """A schedule's orders; it passes its check and has the problem's ranks, placement and microbatches."""
        plan = cls.empty(problem)
        for rank, order in enumerate(schedule.orders):
            parts = len(order.stage)
            plan.length[rank] = parts
            for name in ("kind", "stage", "microbatch", "joined"):
                getattr(plan, name)[rank, :parts] = getattr(order, name)
        return plan

    def copy(self) -> Plan:
        """The same orders, to be changed."""
        return Plan(
            kind=self.kind.copy(),
            stage=self.stage.copy(),
            microbatch=self.microbatch.copy(),
            joined=self.joined.copy(),
            length=self.length.copy(),
        )

    def schedule(self, problem: Problem, name: str) -> Schedule:
        """The plan as a schedule."""
        columns = (self.stage, self.kind, self.microbatch, self.joined)
        return Schedule(
            orders=tuple(
                Order(*(column[rank, :parts] for column in columns)) for rank, parts in enumerate(self.length.tolist())
            ),
            placement=problem.placement,
            microbatches=problem.microbatches,
            name=name,
        )

    def objective_s(self, problem: Problem) -> float:
        """The problem's objective in seconds, as `ppsim.simulate` finds it; inf if the plan would wait for ever."""
        start, end = np.zeros(self.kind.shape), np.zeros(self.kind.shape)
        columns = (self.kind, self.stage, self.microbatch, self.joined, self.length)
        if not run_plan(problem.tables, problem.microbatches, *columns, start, end):
            return float("inf")
        return float(objective_of(start, end, self.length, problem.by_rank_time)[0])

    def peak_bytes(self, problem: Problem) -> Integers:
        """The largest activation bytes of each rank, shape (p,), as `ppsim.simulation.memory_levels` defines them."""
        return np.array(
            [peak_of_rank(problem.tables, self.kind[r], self.stage[r], self.length[r]) for r in range(problem.ranks)],
            np.int64,
        )
