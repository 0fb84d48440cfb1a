"""Proofs by `search(prove=True)`, against published optima and what cannot be asked."""

from __future__ import annotations

import math

import pytest

from ppsim import InputError, SearchResult, StageCost, search
from ppsim.cli.main import main
from ppsim.order_search import proof
from ppsim.order_search.problem import make_problem
from tests.support.all_orders import OPTIMA
from tests.support.commandline import COSTS, refused


def _found(p: int, m: int, v: int, placement: str, limit: float, **options: float) -> SearchResult:
    stage = StageCost(
        forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=2, weight_activation_bytes=1
    )
    return search([stage] * (p * v), ranks=p, microbatches=m, memory_limit_bytes=2 * v * limit, stages_per_rank=v,
                  placement=placement, **options)  # fmt: skip


@pytest.mark.parametrize(("p", "m", "v", "placement", "limit", "optimum"), OPTIMA)
def test_a_small_step_is_proved_to_be_the_best(p, m, v, placement, limit, optimum) -> None:
    found = _found(p, m, v, placement, limit, prove=True)
    assert found.trace.makespan_s == optimum
    assert found.lower_bound_s == pytest.approx(optimum, rel=1e-12)


def test_a_proof_cut_short_still_bounds() -> None:
    found = _found(4, 6, 1, "loop", 2, prove=True, time_limit_s=1e-9)
    assert found.lower_bound_s <= 31 <= found.trace.makespan_s


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan])
def test_a_time_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="time_limit_s must be"):
        _found(2, 2, 1, "loop", 1, prove=True, time_limit_s=seconds)


def test_the_command_line_says_what_is_proved(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"search --ranks 3 --microbatches 5 {COSTS} --prove"
    assert main(words.split()) == 0
    assert "(optimal)" in capsys.readouterr().out
    assert "time_limit_s must be seconds above 0" in refused(capsys, words, "--time-limit-s 0")


@pytest.mark.parametrize("ranks", range(2, 9))
def test_no_few_ranks_are_looked_at_twice(ranks: int) -> None:
    """Cause: on four ranks the one in the middle is also the last but one, and a million steps were walked twice."""
    stage = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1)
    free = {"network": None, "memory_limit_bytes": None, "stages_per_rank": 1, "placement": "loop"}
    problem = make_problem([stage] * ranks, ranks=ranks, microbatches=2, objective="makespan", **free)
    sets = [tuple(each) for each in proof._few_ranks(problem)]
    assert len(set(sets)) == len(sets)
    assert all({0, ranks - 1} <= set(each) for each in sets)
