"""Recomputation: the same bits for less memory, and no layer computed a third time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.models.mlp import MLPBlock
from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.recomputing_stage import RecomputingStage
from ppexec.stage.stage import Stage
from ppsim.simulation.memory_levels import activation_levels
from tests.support.chains import Case, cases
from tests.support.layers import WIDTH
from tests.support.remote import tiny
from tests.support.settings import with_workers
from tests.support.stage_steps import STAGE_CASES, StageCase, StepData, assert_same_bits, stage_of, stepped

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


class Counting(nn.Module):
    """Counts its forwards, and how many of them kept a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.forwards = self.with_graph = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        self.with_graph += torch.is_grad_enabled()
        return self.linear(value).tanh()


@settings(max_examples=40)
@given(case=STAGE_CASES)
def test_a_stage_computed_anew_has_the_same_bits(case: StageCase) -> None:
    plain, anew = case.stages(RecomputingStage)
    data = StepData.drawn(is_last=case.is_last)
    assert_same_bits(
        (plain, anew), (stepped(plain, data, split=case.is_split), stepped(anew, data, split=case.is_split))
    )


@pytest.mark.parametrize("is_split", [False, True])
def test_every_layer_is_computed_twice_and_once_with_a_graph(is_split: bool) -> None:
    layers = [Counting() for _ in range(3)]
    stage = stage_of(list(layers), RecomputingStage)
    stage.forward(0, torch.randn(2, WIDTH), None, split=is_split)
    assert [(layer.forwards, layer.with_graph) for layer in layers] == [(1, 0)] * 3
    if is_split:
        stage.backward_input(0, torch.randn(2, WIDTH))
        assert [(layer.forwards, layer.with_graph) for layer in layers] == [(2, 1)] * 3
        stage.backward_weight(0)
    else:
        stage.backward(0, torch.randn(2, WIDTH))
    assert [(layer.forwards, layer.with_graph) for layer in layers] == [(2, 1)] * 3


@pytest.mark.parametrize("blocks", [1, 3])
def test_between_actions_it_holds_the_inputs_and_the_output_and_after_i_what_w_needs(blocks: int) -> None:
    width, rows, size = 16, 6, 4
    layers: list[nn.Module] = [MLPBlock(width, 4 * width) for _ in range(blocks)]
    unit = rows * width * size
    levels = {}
    for kind in (Stage, RecomputingStage):
        stage = stage_of(layers, kind)
        stage.ledger = ledger = Ledger(tensors_of(layers))
        stage.forward(0, torch.randn(rows, width), None, split=True)
        levels[kind] = [ledger.level_bytes]
        stage.backward_input(0, torch.randn(rows, width))
        levels[kind].append(ledger.level_bytes)
        stage.backward_weight(0)
        levels[kind].append(ledger.level_bytes)
        stage.forward(0, torch.randn(rows, width), None)
        levels[kind].append(ledger.level_bytes)
        stage.backward(0, torch.randn(rows, width))
        levels[kind].append(ledger.level_bytes)
    # Per block: input and fc1's output and GELU's; between I and W: what fc1 and fc2 were given, and their gradients.
    whole, between = (blocks * 9 + 1) * unit, blocks * 10 * unit
    assert levels[Stage] == [whole, between, 0, whole, 0]
    assert levels[RecomputingStage] == [(blocks + 1) * unit, between, 0, (blocks + 1) * unit, 0]


def test_a_layer_that_changes_its_input_is_refused() -> None:
    """What is kept would not be what it was given, and the gradients wrong without a word."""
    stage = stage_of([nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)], RecomputingStage)
    with pytest.raises(ValueError, match=r"layer 1 \(ReLU\) changes its input in place, so it cannot be recomputed"):
        stage.forward(0, torch.randn(2, WIDTH), None)


def test_an_evaluation_keeps_nothing() -> None:
    stage = stage_of([nn.Linear(WIDTH, WIDTH)], RecomputingStage, trains=False)
    stage.ledger = ledger = Ledger([])
    assert not stage.forward(0, torch.randn(2, WIDTH), None).requires_grad
    assert ledger.level_bytes == 0


# On real workers


def works_in_place(case: Case) -> bool:
    """Whether some layer of a random chain changes its input; torch's names for these end in an underscore."""
    _, _, spelled_chain = str(case.values.get("model", "")).partition("__")
    return '_"' in bytes.fromhex(spelled_chain).decode()


@with_workers
@given(case=cases(recompute=False))
def test_every_run_is_bit_equal_to_one_process_that_computes_nothing_anew(
    case: Case, pool: WorkerPool, tmp_path: Path
) -> None:
    assume(not works_in_place(case))  # refused: an overwritten input cannot be used again
    case.values["recompute"] = True
    report = ppexec.verify(case.config(tmp_path), pool=pool)
    assert report.first_difference is None
    assert report.passed


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1", "zb-v"])
def test_the_mlp_holds_what_stated_costs_predict_after_every_action(schedule: str, pool: WorkerPool) -> None:
    config = tiny(schedule=schedule, layers=8, hidden=6, intermediate=10, seq=3, recompute=True)
    unit = 3 * 4
    block = ppsim.LayerCost(
        forward_s=1,
        backward_input_s=1,
        backward_weight_s=1,
        activation_bytes=unit * (6 + 2 * 10 + 6),
        weight_activation_bytes=unit * (6 + 2 * 10 + 6),
        output_bytes=unit * 6,
    )
    layers = ppsim.recompute_layers([block] * 8, input_bytes=unit * 6)
    stages = ppsim.partition(layers, stages=config.pipeline.stages, method=config.layer_sizes)
    with Session(config, pool=pool) as session:
        counted = session.count_memory()
        profiled = session.profile(1).layers
    program = config.pipeline.program
    expected = activation_levels(program, stages)
    assert counted == [expected[list(program.rows_of(rank))].tolist() for rank in range(2)]
    assert [layer.activation_bytes for layer in profiled] == [layer.activation_bytes for layer in layers]
    if "zb" in schedule:
        assert [layer.weight_activation_bytes for layer in profiled] == [block.weight_activation_bytes] * 8


def test_a_gpt_holds_far_less(pool: WorkerPool) -> None:
    peaks = []
    for recompute in (False, True):
        with Session(tiny(model="gpt", seq=8, recompute=recompute), pool=pool) as session:
            peaks.append(max(session.count_memory()[0]))
    # Rank 0 with the embedding and two blocks: 4 microbatches of int64 tokens, two inputs of blocks, an output.
    assert peaks[1] == 4 * (8 * 8 + 3 * 8 * 8 * 4)
    assert peaks[1] < peaks[0] / 5


def test_a_loss_holds_no_memory_but_its_number() -> None:
    """PyTorch's mean squared error lies in memory as large as the output; a plain stage kept its number alone."""
    stage = stage_of([nn.Linear(WIDTH, WIDTH)], RecomputingStage, index=0, loss=nn.functional.mse_loss)
    stage.forward(0, torch.ones(4, WIDTH), torch.zeros(4, WIDTH))
    assert stage.losses[0].untyped_storage().nbytes() == stage.losses[0].nbytes
