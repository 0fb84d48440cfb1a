"""Branch and bound against all orders of tiny problems and published optima, and its bounds against it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppsim import Link, Network, StageCost
from ppsim.order_search.branch_and_bound import walk
from ppsim.order_search.lower_bound import lower_bound_s
from ppsim.order_search.plan import Plan
from ppsim.order_search.problem import Problem, make_problem
from tests.support.all_orders import OPTIMA, optimum_s
from tests.support.random_stages import random_stages


def even_problem(p: int, m: int, v: int, placement: str, limit: float, objective: str = "makespan") -> Problem:
    stage = StageCost(
        forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=2, weight_activation_bytes=1
    )
    return make_problem([stage] * (p * v), ranks=p, microbatches=m, network=None, memory_limit_bytes=2 * v * limit,
                        stages_per_rank=v, placement=placement, objective=objective)  # fmt: skip


def assert_is_plan_of(problem: Problem, plan: Plan, objective_s: float) -> None:
    plan.schedule(problem, "walk").check()
    assert (plan.peak_bytes(problem) <= problem.limit_bytes).all()
    assert plan.objective_s(problem) == pytest.approx(objective_s, rel=1e-9)


@pytest.mark.parametrize(("p", "m", "v", "placement", "limit", "optimum"), OPTIMA)
def test_finds_the_optimum_of_another_solver_and_proves_it(p, m, v, placement, limit, optimum) -> None:
    problem = even_problem(p, m, v, placement, limit)
    found = walk(problem, optimum + 5)
    assert found.is_complete
    assert found.bound_s == optimum
    assert_is_plan_of(problem, found.plan, optimum)
    proof = walk(problem, optimum)
    assert proof.is_complete
    assert proof.plan is None
    assert proof.bound_s == optimum


# ranks, microbatches, stages per rank, whether a full B is cheaper
TINY = [(2, 2, 1, True), (2, 3, 1, False), (2, 3, 1, True), (3, 2, 1, True), (2, 1, 2, True)]


@pytest.mark.parametrize(("p", "m", "v", "fused"), TINY)
def test_is_the_best_of_all_orders(p: int, m: int, v: int, fused: bool) -> None:
    network = Network(latency_s=0.1, bytes_per_s=10, links={(0, 1): Link(latency_s=0.4)})
    for seed in range(3):
        stages = random_stages(p * v, 100 * seed + p, fused=fused)
        least = max(sum(stages[s].activation_bytes for s in range(r, p * v, p)) for r in range(p))
        for limit in (least, int(1.5 * least), None):
            for objective in ("makespan", "rank_time"):
                problem = make_problem(stages, ranks=p, microbatches=m, network=network, memory_limit_bytes=limit,
                                       stages_per_rank=v, placement="loop", objective=objective)  # fmt: skip
                best_s = optimum_s(problem)[objective]
                found = walk(problem, 2 * best_s)
                assert found.is_complete
                assert found.bound_s == pytest.approx(best_s, rel=1e-9)
                assert_is_plan_of(problem, found.plan, best_s)


def random_tiny(seed: int) -> Problem:
    random = np.random.default_rng(seed)
    placement, v = [("loop", 1), ("loop", 2), ("v", 2)][seed % 3]
    p, m = int(random.integers(2, 4)), int(random.integers(2, 5))
    stages = random_stages(p * v, seed, fused=seed % 2 == 0)
    whole = max(sum(stage.activation_bytes for stage in stages[r::p]) for r in range(p))
    if placement == "v":
        whole = max(stages[r].activation_bytes + stages[-1 - r].activation_bytes for r in range(p))
    network = Network(latency_s=float(random.choice([0, 0.3])), bytes_per_s=float(random.choice([4, math.inf])))
    return make_problem(stages, ranks=p, microbatches=m, network=network,
                        memory_limit_bytes=whole * float(random.choice([1, 1.4, 2, 3])), stages_per_rank=v,
                        placement=placement, objective=str(random.choice(["makespan", "rank_time"])))  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_no_bound_is_above_the_optimum(seed: int) -> None:
    problem = random_tiny(seed)
    exact = walk(problem, 1e9, most_steps=100_000)
    if not exact.is_complete:
        pytest.skip("too many partial steps")
    assert lower_bound_s(problem) <= exact.bound_s * (1 + 1e-9)
    # What is left unfinished gives a bound, not an answer.
    for most_steps in (10, 200):
        part = walk(problem, exact.bound_s * 1.2, most_steps=most_steps)
        assert part.bound_s <= exact.bound_s * (1 + 1e-9)
    # Some ranks alone, the others as delays.
    ends = sorted({0, problem.placement[-1]})
    for ranks in (ends, sorted({*ends, 1})):
        assert walk(problem, exact.bound_s * 1.2, only_ranks=ranks).bound_s <= exact.bound_s * (1 + 1e-9)
    beam = walk(problem, 1e9, width=20)
    if beam.plan is not None:
        assert exact.bound_s <= beam.plan.objective_s(problem) * (1 + 1e-9)
        assert (beam.plan.peak_bytes(problem) <= problem.limit_bytes).all()
    assert beam.bound_s <= exact.bound_s * (1 + 1e-9)


@pytest.mark.parametrize(("placement", "ranks"), [("loop", (0, 7)), ("v", (0, 7))])
def test_two_ranks_prove_an_optimum(placement: str, ranks: tuple[int, ...]) -> None:
    """p = m = 8 with two stages each, memory for four microbatches of a rank: 71 units, where the bound was 65."""
    problem = even_problem(8, 8, 2, placement, 4)
    assert lower_bound_s(problem) == 65
    found = walk(problem, 71, only_ranks=ranks)
    assert found.is_complete
    assert found.bound_s == 71
    with pytest.raises(ValueError, match="do not hold the first and the last stage"):
        walk(problem, 71, only_ranks=[3])
