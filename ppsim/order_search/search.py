"""Search: the best order found under an activation limit, and what no order can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppsim.checks import checked
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.network.host_link import HostLink
from ppsim.network.network import Network
from ppsim.order_search.lower_bound import lower_bound_s
from ppsim.order_search.problem import UNLIMITED_BYTES, make_problem
from ppsim.schedule.schedule import Schedule
from ppsim.shown import shown_by
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What a search found.

    Parameters
    ----------
    schedule : Schedule
        The best order found.
    trace : Trace
        `ppsim.simulate` of it.
    lower_bound_s : float
        No order under the limit has a smaller objective (to one part in 10^9). Where the result's is as small, the
        result is optimal. For the proofs see `ppsim.order_search.lower_bound.lower_bound_s` and
        `ppsim.order_search.branch_and_bound.walk`.
    """

    schedule: Schedule
    trace: Trace
    lower_bound_s: float

    def _repr_html_(self) -> str:
        return str(shown_by("search_html", self))


@checked
def search(
    stages: Sequence[StageCost],
    *,
    ranks: int,
    microbatches: int,
    network: Network | None = None,
    memory_limit_bytes: float | Sequence[float] | None = None,
    stages_per_rank: int = 1,
    placement: str = "loop",
    objective: str = "makespan",
    prove: bool = False,
    time_limit_s: float = 60.0,
    recompute: bool = False,
    offload: HostLink | None = None,
) -> SearchResult:
    """Find an order of F, B, I and W that is fast for these costs and links, under a limit on activation memory.

    Parameters
    ----------
    stages : sequence of ranks * stages_per_rank StageCost
        What each stage costs for one microbatch.
    ranks, microbatches : int
        p and m.
    network : Network, optional
        The links between ranks. By default messages are free.
    memory_limit_bytes : float or sequence of p floats, optional
        The most that `Trace.peak_activation_bytes` may be: one number for all ranks, or one for each. By default there
        is no limit.
    stages_per_rank : int
        v.
    placement : "loop" or "v"
        "loop" puts stage s on rank s mod p. "v" puts two stages on each rank, there and back.
    objective : "makespan" or "rank_time"
        What is to be small. "rank_time" is the longest time of a single rank, from its first start to its last end,
        which bounds steps that follow each other.
    prove : bool
        Go on after the search, through all orders that may still be better. Then the result is the best of all
        orders and `lower_bound_s` its objective; or, where the time does not suffice, `lower_bound_s` says how far from
        the best it may be. Takes seconds where some ten microbatches of a few stages fit into memory at a time. Of
        stages that communicate only the bound gets better.
    time_limit_s : float
        The most seconds that `prove` may add. A result that it cuts short may differ from one machine to another.
    recompute : bool
        Whether forwards may be computed once more (R) where that lets a faster order fit the limit.
    offload : HostLink, optional
        How long activations take to host memory and back. With it they may go there (O and L) for the same purpose.

    Returns
    -------
    SearchResult

    Raises
    ------
    InputError
        For a limit under which no order exists, naming the smallest that suffices, and for numbers that do not match;
        for `prove` with recomputation or offloading, which it does not go through.

    Notes
    -----
    Each backward may be split into I and W or stay whole. The result is never worse than any schedule of
    `ppsim.schedule_names()` that has this placement and fits the limit. For limits that are one number it is never
    worse than the result under a smaller limit (with very many actions: to one part in 10^12). The same inputs give
    the same result. The first call on a machine compiles for some twenty seconds.

    A list scheduler runs every rank by a policy, after the heuristic of Qi et al., Zero Bubble Pipeline Parallelism,
    ICLR 2024: fill the warm-up with forwards as memory allows, alternate, and put W into gaps and where memory is
    needed. Many policies are tried. The best are tuned rank by rank. The orders that result, and those of the named
    schedules, are improved by moving actions on the critical path.

    With `recompute` or `offload` the result is never worse than without. Orders found under looser limits are made to
    fit (see `ppsim.order_search.recompute_offload.best_with_less_memory`), which makes the search longer;
    `lower_bound_s` is then that of a search without a limit.

    Examples
    --------
    With F = I = W, room for twice as many microbatches as ranks and free messages no rank idles between its actions
    (ZB-H2 of the same paper):

    >>> import ppsim
    >>> cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1)
    >>> found = ppsim.search([cost] * 2, ranks=2, microbatches=6, memory_limit_bytes=4, objective="rank_time")
    >>> found.trace.rank_time_s.tolist(), found.lower_bound_s
    ([18.0, 18.0], 18.0)

    Where memory holds half as many microbatches as there are ranks, all orders show that there is none better:

    >>> found = ppsim.search([cost] * 4, ranks=4, microbatches=6, memory_limit_bytes=2, prove=True)
    >>> found.trace.makespan_s == found.lower_bound_s
    True

    With a host's memory room for half of the activations is no limit at all, where a copy fits under a forward (Wan et
    al., 2025, "PipeOffload"):

    >>> cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8)
    >>> few, many = (
    ...     ppsim.search([cost] * 6, ranks=6, microbatches=12, memory_limit_bytes=limit) for limit in (24, None)
    ... )
    >>> moved = ppsim.search(
    ...     [cost] * 6, ranks=6, microbatches=12, memory_limit_bytes=24, offload=ppsim.HostLink(bytes_per_s=8.0)
    ... )
    >>> moved.trace.makespan_s == many.trace.makespan_s < few.trace.makespan_s
    True
    """
    saves_memory = recompute or offload is not None
    if prove and saves_memory:
        raise InputError(
            "prove goes through orders that keep their activations: leave prove, or recompute and offload, out"
        )
    if not time_limit_s > 0:
        raise InputError(f"time_limit_s must be seconds above 0, got {time_limit_s!r}")
    problem = make_problem(
        stages,
        ranks=ranks,
        microbatches=microbatches,
        network=network,
        memory_limit_bytes=memory_limit_bytes,
        stages_per_rank=stages_per_rank,
        placement=placement,
        objective=objective,
    )
    # These import numba, which takes a second.
    from ppsim.order_search.memory_limits import best_plan
    from ppsim.order_search.proof import SAME, proved

    bound = lower_bound_s(problem)
    plan, name = best_plan(problem)
    found_s = plan.objective_s(problem)
    if found_s > bound * SAME:
        proof = proved(problem, bound, found_s, time_limit_s if prove else 0.0)
        bound = proof.bound_s
        if proof.plan is not None:
            plan, name = proof.plan, "search"
    schedule = plan.schedule(problem, name)
    trace = simulate(schedule, stages, network=problem.network, engine="compiled")
    reached = float(trace.rank_time_s.max()) if problem.by_rank_time else trace.makespan_s
    expected = plan.objective_s(problem)
    if abs(reached - expected) > 1e-9 * max(reached, expected):
        raise RuntimeError(f"the search's own clock says {expected} s and the simulator {reached} s: please report")
    if saves_memory and (problem.limit_bytes < UNLIMITED_BYTES).any():
        from ppsim.order_search.recompute_offload import best_with_less_memory

        bound = lower_bound_s(problem.with_limit(np.full(ranks, UNLIMITED_BYTES, np.int64)))
        lighter = None
        if reached > bound * SAME:
            lighter = best_with_less_memory(problem, recompute=recompute, host_link=offload, below_s=reached)
        if lighter is not None:
            schedule, trace = lighter
            reached = float(trace.rank_time_s.max()) if problem.by_rank_time else trace.makespan_s
    return SearchResult(schedule=schedule, trace=trace, lower_bound_s=reached if reached <= bound * SAME else bound)
