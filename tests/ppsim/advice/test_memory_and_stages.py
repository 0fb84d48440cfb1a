"""Advice on runs that tell memory, hold several stages per rank, or split no backward."""

from __future__ import annotations

import pytest

import ppsim
from ppsim.cli.advise_command import _chosen

COST = ppsim.StageCost(
    forward_s=1.0,
    backward_input_s=1.0,
    backward_weight_s=1.0,
    activation_bytes=100,
    weight_activation_bytes=60,
    parameter_bytes=1000,
)


def run_of(name: str, **options: int) -> ppsim.Run:
    schedule = ppsim.build_schedule(name, ranks=4, microbatches=8, **options)
    return ppsim.Run(traces=[ppsim.simulate(schedule, [COST] * schedule.stages)], steps=[0])


def test_what_w_holds_of_a_run_that_never_splits_is_the_most_it_can_be() -> None:
    """It was 0, so that ZB-H2 was said to fit where it does not."""
    costs = ppsim.costs_of(run_of("1f1b"))
    assert [cost.weight_activation_bytes for cost in costs] == [100] * 4
    zb = ppsim.build_schedule("zb-h2", ranks=4, microbatches=8)
    truth = ppsim.simulate(zb, [COST] * 4).peak_activation_bytes
    assert (costs.predict(zb).peak_activation_bytes >= truth).all()
    advice = ppsim.advise(run_of("1f1b"), with_search=False)
    zb_h2 = next(each for each in advice.candidates if each.name == "zb-h2")
    assert any("to hold all that B holds" in note for note in zb_h2.uncertain)


def test_a_limit_is_of_all_memory_that_the_run_tells() -> None:
    """It was of activations alone, and every schedule fitted."""
    run = run_of("1f1b")
    held = run.median.memory.total_bytes
    advice = ppsim.advise(run, memory_limit_bytes=float(held.max() - 1), with_search=False)
    assert advice.current.memory_bytes.tolist() == held.tolist()
    assert advice.current.fits is False
    assert ppsim.advise(run, memory_limit_bytes=float(held.max()), with_search=False).current.fits


def test_a_run_with_several_stages_per_rank_is_advised() -> None:
    """Named schedules were built with their natural number of stages, and none was of the run's."""
    advice = ppsim.advise(run_of("interleaved-1f1b", stages_per_rank=4))
    assert {"looped-bfs", "interleaved-zb"} <= {each.name for each in advice.candidates}
    assert any(each.name.startswith("searched, 4") for each in advice.candidates)
    assert "a run with one stage on each rank, which can be cut anew" in advice.left_out["1f1b"]


def test_the_runs_own_schedule_goes_before_a_candidate_of_its_name() -> None:
    """Grouped and ungrouped interleaving have one name: the table's first was written as the other."""
    advice = ppsim.advise(run_of("interleaved-1f1b", microbatch_group=8), with_search=False)
    assert "interleaved-1f1b" in {each.name for each in advice.candidates}
    own = advice.current.name
    assert _chosen(advice, own) is advice.current


def test_a_run_that_takes_no_time_is_refused() -> None:
    free = ppsim.StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=2)
    run = ppsim.Run(traces=[ppsim.simulate(schedule, [free] * 2)], steps=[0])
    with pytest.raises(ppsim.InputError, match="takes 0 s"):
        ppsim.advise(run)


def test_a_rank_without_actions_has_costs() -> None:
    schedule = ppsim.Schedule.of([["0F0", "0B0"], []])
    run = ppsim.Run(traces=[ppsim.simulate(schedule, [COST])], steps=[0])
    assert ppsim.costs_of(run)[0].activation_bytes == 100
