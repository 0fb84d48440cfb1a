"""Plan: all orders of a step as rectangular arrays, which the compiled kernels read and write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.order_search.plan_times import objective_of, peak_of_rank, run_plan
from ppsim.order_search.problem import Integers, Problem
from ppsim.schedule.action import Kind
from ppsim.schedule.order import Order
from ppsim.schedule.schedule import Schedule


class Plan(NamedTuple):
    """One order per rank, to be changed in place. A is the room for the actions of a rank, 3 v m.

    Machine code knows the fields by position, so this file counts as one with kernels for `ppsim.kernel_cache`.

    Parameters
    ----------
    kind, stage, microbatch : (p, A)
        Row r is the order of rank r.
    joined : (p, A)
        Marks the forward of an overlapped pair; the next entry is its backward.
    length : (p,)
        How many entries of each row count.
    """

    kind: npt.NDArray[np.int8]
    stage: npt.NDArray[np.int32]
    microbatch: npt.NDArray[np.int32]
    joined: npt.NDArray[np.bool_]
    length: Integers

    @classmethod
    def empty(cls, problem: Problem) -> Plan:
        """A plan without actions, with room for F, I and W of every stage and microbatch."""
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
        """The orders of a schedule that passes its check and has the problem's placement and microbatches."""
        plan = cls.empty(problem)
        for rank, order in enumerate(schedule.orders):
            parts = len(order.stage)
            plan.length[rank] = parts
            for name in ("kind", "stage", "microbatch", "joined"):
                getattr(plan, name)[rank, :parts] = getattr(order, name)
        return plan

    def copy(self) -> Plan:
        """The same orders in new arrays."""
        return Plan._make(column.copy() for column in self)

    def with_full_backwards(self) -> Plan:
        """The same orders with a B in place of every I, and without W."""
        plan = self.copy()
        for rank, parts in enumerate(self.length.tolist()):
            kept = np.flatnonzero(self.kind[rank, :parts] != Kind.W)
            plan.length[rank] = len(kept)
            for column in (plan.stage, plan.kind, plan.microbatch, plan.joined):
                column[rank, : len(kept)] = column[rank, kept]
        plan.kind[plan.kind == Kind.I] = Kind.B
        return plan

    def schedule(self, problem: Problem, name: str) -> Schedule:
        """The plan as a schedule of that name."""
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
        """The problem's objective in seconds, as `ppsim.simulate` finds it; inf if the plan deadlocks."""
        start_s, end_s = np.zeros(self.kind.shape), np.zeros(self.kind.shape)
        if not run_plan(problem.tables, self, start_s, end_s):
            return float("inf")
        last_end_s = end_s[np.arange(problem.ranks), self.length - 1]
        return float(objective_of(start_s[:, 0], last_end_s, problem.by_rank_time)[0])

    def peak_bytes(self, problem: Problem) -> Integers:
        """The most activation bytes of each rank, shape (p,), as `ppsim.simulation.memory_levels` defines them."""
        return np.array(
            [
                peak_of_rank(problem.tables, self.kind[rank], self.stage[rank], self.length[rank])
                for rank in range(problem.ranks)
            ],
            np.int64,
        )
