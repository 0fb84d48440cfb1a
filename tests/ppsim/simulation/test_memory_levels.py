"""Activation bytes against the evaluator, which counts every level afresh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import CostError, Schedule, StageCost, build_schedule, simulate
from ppsim.simulation.memory_levels import activation_levels
from ppsim.trace.memory import peak_per_rank
from tests.support.evaluator import evaluate, spelled
from tests.support.strategies import schedules, stage_costs


def _costs(*amounts: tuple[int, int]) -> list[StageCost]:
    return [
        StageCost(
            forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=whole, weight_activation_bytes=kept
        )
        for whole, kept in amounts
    ]


@given(st.data())
def test_levels_and_peaks(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    costs = data.draw(stage_costs(schedule.stages))
    program, answer = schedule.program, evaluate(spelled(schedule), schedule.placement, costs)
    levels = activation_levels(program, costs)
    for rank in range(schedule.ranks):
        rows = list(program.rows_of(rank))
        wanted = answer.levels[rank]
        assert levels[rows].tolist() == wanted
        assert wanted == [] or wanted[-1] == 0  # what was taken is given back
    assert peak_per_rank(program, levels).tolist() == answer.peaks


@given(schedules())
def test_an_evaluation_holds_nothing(schedule: Schedule) -> None:
    schedule = schedule.forward_only()
    assert not activation_levels(schedule.program, _costs(*[(5, 3)] * schedule.stages)).any()


@pytest.mark.parametrize("microbatches", [1, 4, 9])
def test_afab_holds_every_microbatch_and_its_eager_last_rank_one(microbatches: int) -> None:
    costs = _costs((7, 2), (7, 2), (7, 2))
    full = simulate(build_schedule("afab", ranks=3, microbatches=microbatches), costs)
    assert full.peak_activation_bytes.tolist() == [7 * microbatches] * 3
    eager = simulate(build_schedule("afab-eager", ranks=3, microbatches=microbatches), costs)
    assert eager.peak_activation_bytes.tolist() == [7 * microbatches, 7 * microbatches, 7]


def test_a_split_backward_leaves_what_w_needs_even_if_it_is_more() -> None:
    schedule = Schedule.of([["0F0", "0F1", "0I0", "0I1", "0W0", "0W1"]])
    assert activation_levels(schedule.program, _costs((10, 3))).tolist() == [10, 20, 13, 6, 3, 0]
    assert activation_levels(schedule.program, _costs((10, 15))).tolist() == [10, 20, 25, 30, 15, 0]
    assert peak_per_rank(schedule.program, activation_levels(schedule.program, _costs((10, 15)))).tolist() == [30]


def test_a_pair_holds_both_microbatches_while_it_runs() -> None:
    schedule = Schedule.of([["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"]])
    assert activation_levels(schedule.program, _costs((10, 0))).tolist() == [10, 20, 10, 0]


def test_dualpipe_v_s_peak_by_hand() -> None:
    """PP + 1 of DeepSeek-AI's table, whose PP stages are two on each of p ranks: 2p + 1 chunks.

    Two ranks, four microbatches, chunks held after each computation as drawn at `dualpipe_v`:

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3 3B1) (3F2 0B0) 3B2 (3F3 0B1) 3B3 0I2 0W2 0I3 0W3
              1   2   3   4   4   3   4    5   4     5   4    3    4   3    2   2   1   1   0
    rank 1  1F0 2F0 1F1 2F1 1F2 2B0 (2F2 1B0) (1F3 2B1) (2F3 1B1) 2B2 1B2 2I3 1I3 2W3 1W3
              1   2   3   4   5   4    5   4     5   4     5   4    3   2   2   2   1   0
    """
    schedule = build_schedule("dualpipe-v", ranks=2, microbatches=4)
    program = schedule.program
    levels = activation_levels(program, _costs(*[(1, 1)] * 4))
    by_hand = (
        [1, 2, 3, 4, 4, 3, 4, 5, 4, 5, 4, 3, 4, 3, 2, 2, 1, 1, 0],
        [1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 4, 3, 2, 2, 2, 1, 0],
    )
    assert [levels[list(program.rows_of(rank))].tolist() for rank in range(2)] == list(by_hand)
    assert peak_per_rank(program, levels).tolist() == [2 * 2 + 1] * 2


def test_sums_beyond_64_bits_are_refused() -> None:
    """Cause of a bug: they wrapped to negative bytes."""
    schedule = build_schedule("afab", ranks=1, microbatches=1024)
    with pytest.raises(CostError, match=r"exceed 2\*\*63 bytes"):
        activation_levels(schedule.program, _costs((2**53, 0)))
    fits = build_schedule("afab", ranks=1, microbatches=1023)
    assert activation_levels(fits.program, _costs((2**53, 0))).max() == np.int64(1023 * 2**53)
