"""Search: the best order found under an activation limit, and what no order can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppsim.costs.stage_cost import StageCost
from ppsim.network.network import Network
from ppsim.schedule.schedule import Schedule
from ppsim.search.lower_bound import lower_bound_s
from ppsim.search.problem import make_problem
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """schedule: the best order found. trace: `ppsim.simulate` of it. lower_bound_s: no order under the limit has a
    smaller objective (the argument: `lower_bound.lower_bound_s`); equal to the result's where it is optimal."""

    schedule: Schedule
    trace: Trace
    lower_bound_s: float


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
) -> SearchResult:
    """The best order found for these costs, links and limit.

    stages: one cost for each of ranks * stages_per_rank stages, for one microbatch. network: None makes messages
    free. memory_limit_bytes: the most that `peak_activation_bytes` may be, one number for all ranks or one for each;
    None for no limit. placement: "loop" (stage s on rank s mod p), or "v" with two stages per rank (there and back).
    objective: "makespan", or "rank_time", the longest time of a single rank from its first start to its last end,
    which bounds steps that follow each other.

    The backward may be split into I and W or stay whole, action by action. The result is never worse than any
    schedule of `ppsim.schedule_names()` that has this placement and fits the limit, and, for limits that are one
    number, never worse than the result under a smaller limit (with very many actions: to one part in 10^12). The
    same inputs give the same result. The first call on a machine compiles for some twenty seconds.

    How: a list scheduler runs every rank by a policy (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section
    4, has the idea: fill the warm-up with forwards as memory allows, alternate, put W into gaps and where memory is
    needed). Many policies are tried, the best are tuned rank by rank, and the orders that result, and the named
    schedules', are improved by moving actions on the critical path.

    Raises ValueError for a limit that nothing fits, naming the smallest that would, and for numbers that do not match.
    """
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
    from ppsim.search.memory_limits import best_plan  # compiles; `import ppsim` stays fast

    bound = lower_bound_s(problem)
    plan, name = best_plan(problem)
    schedule = plan.schedule(problem, name)
    trace = simulate(schedule, stages, network=problem.network, engine="compiled")
    reached = float(trace.rank_time_s.max()) if problem.by_rank_time else trace.makespan_s
    expected = plan.objective_s(problem)
    if abs(reached - expected) > 1e-9 * max(reached, expected):
        raise RuntimeError(f"the search's own clock says {expected} s and the simulator {reached} s: please report")
    return SearchResult(schedule=schedule, trace=trace, lower_bound_s=min(bound, reached))
