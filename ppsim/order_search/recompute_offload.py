"""Recompute and offload: orders too large for a limit, made to fit by recomputing and offloading activations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ppsim.network.host_link import HostLink
from ppsim.order_search.memory_limits import best_plan, named_plans
from ppsim.order_search.problem import UNLIMITED_BYTES, Problem
from ppsim.schedule.action import Kind
from ppsim.schedule.offload import placed_offload
from ppsim.schedule.recomputation import with_recomputation
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace

Mask = npt.NDArray[np.bool_]

# Orders are taken from searches at these multiples of the problem's limit, and at none.
_LOOSER = (1.25, 1.5, 2.0, 3.0)
# How many actions before their use activations start to come back: one is enough where a copy fits under it.
_AHEAD = (1, 2, 3)


def best_with_less_memory(
    problem: Problem, *, recompute: bool, host_link: HostLink | None, below_s: float
) -> tuple[Schedule, Trace] | None:
    """The best step under the problem's limit that recomputes or offloads, if it is shorter than a given time.

    Parameters
    ----------
    problem : Problem
        What is searched.
    recompute : bool
        Whether forwards may be computed once more.
    host_link : HostLink or None
        How long activations take to host memory and back; None if they may not go there.
    below_s : float
        The objective that it must beat, in seconds.

    Returns
    -------
    schedule, trace
        None where nothing better was found.

    Notes
    -----
    It starts from the named schedules and from the orders found under looser limits. Where such an order holds too
    much, activations are chosen one after another: of those that are there when their rank holds the most, those that
    are there the longest. They are offloaded, or recomputed, or offloaded where that leaves time for both copies and
    recomputed elsewhere. No order gets shorter by that, so an order that takes too long by itself is left out.
    """
    found = None
    for schedule in _orders(problem):
        ways = [(0, True)] if recompute else []
        if host_link is not None:
            ways += [(ahead, rest) for ahead in _AHEAD for rest in ([False, True] if recompute else [False])]
        if _objective_s(problem, _simulated(problem, schedule, host_link)) >= below_s:
            continue
        for ahead, recomputes in ways:
            choice = _Choice(
                problem=problem, schedule=schedule, host_link=host_link, ahead=ahead, recomputes=recomputes
            )
            fitting = choice.made_to_fit()
            if fitting is not None and (reached_s := _objective_s(problem, fitting[1])) < below_s:
                found, below_s = fitting, reached_s
    return found


def _orders(problem: Problem) -> list[Schedule]:
    """The orders to start from, each once."""
    plans = [(plan, name) for plan, name, _ in named_plans(problem.with_limit(_unlimited(problem)))]
    for factor in _LOOSER:
        limits = np.minimum(problem.limit_bytes.astype(np.float64) * factor, UNLIMITED_BYTES).astype(np.int64)
        plans.append(best_plan(problem.with_limit(limits)))
    plans.append(best_plan(problem.with_limit(_unlimited(problem))))
    found = {schedule.orders: schedule for schedule in (plan.schedule(problem, name) for plan, name in plans)}
    return list(found.values())


def _unlimited(problem: Problem) -> npt.NDArray[np.int64]:
    return np.full(problem.ranks, UNLIMITED_BYTES, np.int64)


def _simulated(problem: Problem, schedule: Schedule, host_link: HostLink | None) -> Trace:
    return simulate(schedule, problem.costs, network=problem.network, engine="compiled", host_link=host_link)


def _objective_s(problem: Problem, trace: Trace) -> float:
    return float(trace.rank_time_s.max()) if problem.by_rank_time else trace.makespan_s


@dataclass(kw_only=True)
class _Choice:
    """Which activations of an order are recomputed and which are offloaded, until it fits.

    ahead: see `Schedule.with_offload`; 0 offloads nothing. recomputes: whether what is not offloaded may be recomputed.
    """

    problem: Problem
    schedule: Schedule
    host_link: HostLink | None
    ahead: int
    recomputes: bool
    again: Mask = field(init=False)
    moved: Mask = field(init=False)
    stays: Mask = field(init=False)  # what cannot be offloaded, since its backward comes too soon

    def __post_init__(self) -> None:
        shape = (self.schedule.stages, self.schedule.microbatches)
        self.again, self.moved, self.stays = np.zeros((3, *shape), bool)
        self.stays[:] = self.ahead == 0

    def made_to_fit(self) -> tuple[Schedule, Trace] | None:
        """The order with as many R, or O and L, as it needs; None where none suffice."""
        while True:
            schedule = self._lighter()
            trace = _simulated(self.problem, schedule, self.host_link)
            peaks = trace.peak_activation_bytes
            over = np.zeros(self.problem.ranks) if peaks is None else peaks - self.problem.limit_bytes
            if not (over > 0).any():
                return schedule, trace
            for rank in np.flatnonzero(over > 0).tolist():
                if not self._choose(trace, rank, int(over[rank])):
                    return None

    def _lighter(self) -> Schedule:
        """The order with what was chosen so far; notes what could not be offloaded."""
        orders = []
        for order in self.schedule.orders:
            chosen = np.isin(order.kind, (Kind.B, Kind.I)) & self.again[order.stage, order.microbatch]
            orders.append(with_recomputation(order, chosen)[0])
        offload = tuple(placed_offload(order, self.moved, max(self.ahead, 1)) for order in orders)
        placed = np.zeros_like(self.moved)
        for copies in offload:
            placed[copies.stage, copies.microbatch] = True
        self.stays |= self.moved & ~placed
        self.moved &= placed
        return replace(self.schedule, orders=tuple(orders), offload=offload if placed.any() else None)

    def _choose(self, trace: Trace, rank: int, excess: int) -> bool:
        """Choose as many activations of a rank as make up for its excess; False if there is nothing left to choose."""
        program, costs = trace.program, self.problem.costs
        rows = np.array(program.rows_of(rank))
        levels = trace.activation_bytes
        if levels is None:
            return False
        peak = int(rows[np.argmax(levels[rows])])
        begin, end = np.full((2, *self.again.shape), -1)
        for kinds, found in (((Kind.F,), begin), ((Kind.B, Kind.I), end)):
            own = rows[np.isin(program.kind[rows], kinds)]
            found[program.stage[own], program.microbatch[own]] = own
        is_there = (begin >= 0) & (begin <= peak) & (end > peak) & ~self.again & ~self.moved
        stage, microbatch = np.nonzero(is_there)
        held_s = trace.end_s[end[is_there]] - trace.start_s[begin[is_there]]
        for at in np.argsort(-held_s, kind="stable").tolist():
            cell, cost = (int(stage[at]), int(microbatch[at])), costs[int(stage[at])]
            if not self.stays[cell] and cost.moved_bytes > 0:
                self.moved[cell] = True
                excess -= cost.moved_bytes
            elif self.recomputes and cost.kept_bytes < cost.activation_bytes:
                self.again[cell] = True
                excess -= cost.activation_bytes - cost.kept_bytes
            else:
                continue
            if excess <= 0:
                break
        return bool((is_there & (self.moved | self.again)).any())
