"""R for real: the same bits as without, computed once more as a whole stage, and every byte as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.models.mlp import MLPBlock
from ppexec.stage.ledger import Ledger, tensors_of
from ppsim.simulation.memory_levels import activation_levels
from tests.support.layers import WIDTH
from tests.support.remote import tiny
from tests.support.stage_steps import STAGE_CASES, StageCase, StepData, assert_same_bits, stage_of, stepped

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


@settings(max_examples=40)
@given(case=STAGE_CASES)
def test_gradients_outputs_and_losses_have_the_same_bits(case: StageCase) -> None:
    """Microbatches 0 and 2 are recomputed, with another between, so that dropout must be drawn by its key."""
    plain, other = case.stages()
    data = StepData.drawn(is_last=case.is_last)
    sent = stepped(plain, data, split=case.is_split), stepped(other, data, split=case.is_split, again=(0, 2))
    assert_same_bits((plain, other), sent)


@pytest.mark.parametrize("blocks", [1, 3])
def test_between_f_and_r_it_holds_its_input_and_its_output(blocks: int) -> None:
    width, rows, size = 16, 6, 4
    layers: list[nn.Module] = [MLPBlock(width, 4 * width) for _ in range(blocks)]
    stage, unit = stage_of(layers), rows * width * size
    stage.ledger = ledger = Ledger(tensors_of(layers))
    levels = []
    for work in (
        lambda: stage.forward(0, torch.randn(rows, width), None, again=True),
        lambda: stage.forward(1, torch.randn(rows, width), None),
        lambda: stage.recompute(0),
        lambda: stage.backward(0, torch.randn(rows, width)),
        lambda: stage.backward(1, torch.randn(rows, width)),
    ):
        work()
        levels.append(ledger.level_bytes)
    # Per block: input and fc1's output and GELU's; and the output of the last.
    whole = (blocks * 9 + 1) * unit
    assert levels == [2 * unit, 2 * unit + whole, 2 * whole, whole, 0]


def test_a_stage_that_changes_its_input_is_refused() -> None:
    """What is kept would not be what it was given, and the gradients wrong without a word."""
    stage = stage_of([nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)])
    with pytest.raises(ValueError, match="stage 1 changes its input in place, so 1R0 cannot compute it once more"):
        stage.forward(0, torch.randn(2, WIDTH), None, again=True)


def test_a_step_that_is_given_up_is_forgotten() -> None:
    stage = stage_of([nn.Linear(WIDTH, WIDTH)])
    stage.forward(0, torch.randn(2, WIDTH), None, again=True)
    stage.clear()
    with pytest.raises(KeyError):
        stage.recompute(0)


@pytest.mark.parametrize("option", ["recompute", "graphs"])
def test_what_does_not_go_with_r_is_refused(option: str, tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    path.write_text(ppsim.build_schedule("1f1b", ranks=2, microbatches=4).with_recompute([1]).to_csv())
    with pytest.raises(ppsim.InputError, match=f"the schedule has 1R0, and {option} .*: leave one of the two out"):
        tiny(from_csv=path, **{option: True})


# On real workers


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_runs_are_bit_equal_and_hold_what_is_predicted(
    schedule: str, share: float, pool: WorkerPool, tmp_path: Path
) -> None:
    path = tmp_path / "again.csv"
    path.write_text(ppsim.build_schedule(schedule, ranks=2, microbatches=4).with_recompute(share=share).to_csv())
    config = tiny(from_csv=path, layers=8, hidden=6, intermediate=10, seq=3)
    report = ppexec.verify(config, pool=pool)
    assert report.gradients_bit_equal
    assert report.outputs_bit_equal
    with Session(config, pool=pool) as session:
        counted = session.count_memory()
        profiled = session.profile(1).stages
    # By hand: rows of 4 bytes; per block the input and both sides of the activation, and the stage's output.
    unit, blocks = 3 * 4, 8 // config.pipeline.stages
    cost = ppsim.StageCost(
        forward_s=1,
        backward_input_s=1,
        backward_weight_s=1,
        activation_bytes=unit * (blocks * (6 + 2 * 10) + 6),
        output_bytes=unit * 6,
        weight_activation_bytes=profiled[0].weight_activation_bytes,
    )
    assert [stage.recompute_bytes for stage in profiled] == [2 * unit * 6] * config.pipeline.stages
    assert all(stage.recompute_s is not None and stage.recompute_s > 0 for stage in profiled if share == 1)
    program = config.pipeline.program
    expected = activation_levels(program, [cost] * config.pipeline.stages)
    assert counted == [expected[list(program.rows_of(rank))].tolist() for rank in range(2)]


def test_timed_compute_recomputes_too(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    path.write_text(ppsim.build_schedule("1f1b", ranks=2, microbatches=4).with_recompute().to_csv())
    cost = ppsim.StageCost(
        forward_s=1e-3,
        backward_input_s=1e-3,
        backward_weight_s=1e-3,
        activation_bytes=100,
        output_bytes=8,
        recompute_s=4e-3,
        recompute_bytes=30,
    )
    config = tiny(from_csv=path)
    with Session(config, pool=pool, costs=[cost] * 2) as session:
        counted = session.count_memory()
        trace = session.measure(1)[0]
    program = config.pipeline.program
    expected = activation_levels(program, [cost] * 2)
    assert counted == [expected[list(program.rows_of(rank))].tolist() for rank in range(2)]
    lengths_s = trace.end_s - trace.start_s
    assert (lengths_s[program.kind == ppsim.Kind.R] >= 4e-3).all()
