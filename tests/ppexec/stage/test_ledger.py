"""Ledger: activation bytes counted on what autograd keeps; equal to what is predicted, after every action."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppexec.calibrate.calibration import Calibration
from ppexec.experiment.experiment import predict_and_measure
from ppexec.models.mlp import MLPBlock
from ppexec.stage.ledger import Ledger, optimizer_bytes, tensors_of
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.simulation.memory_levels import activation_levels, optimizer_state_bytes
from tests.support.chains import Case, cases
from tests.support.named import built
from tests.support.remote import tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


def block_bytes(blocks: int, rows: int, hidden: int, intermediate: int, item: int = 4) -> int:
    """Of a run of MLP blocks: per block its input and both sides of the activation, and the output of the last."""
    return rows * item * (blocks * (hidden + 2 * intermediate) + hidden)


def held(layers: list[nn.Module], inputs: torch.Tensor, older: list[torch.Tensor] | None = None) -> int:
    """What the ledger counts for a forward through the layers, with input and output held as a runtime does."""
    ledger = Ledger([*tensors_of(layers), *(older or [])])
    output = inputs
    with ledger.saving():
        for layer in layers:
            output = layer(output)
    ledger.hold(inputs)
    ledger.hold(output)
    level = ledger.level_bytes
    ledger.drop(inputs)
    ledger.drop(output)
    if output.requires_grad:
        output.sum().backward()
        del output
    gc.collect()
    assert ledger.level_bytes == 0, "all is released once the backward is over"
    return level


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("hidden", "intermediate"), [(4, 16), (5, 3), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mlp_blocks_hold_their_closed_form(blocks: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    layers = [MLPBlock(hidden, intermediate, dtype=dtype) for _ in range(blocks)]
    inputs = torch.randn(2, 3, hidden, dtype=dtype)
    assert held(layers, inputs) == block_bytes(blocks, 6, hidden, intermediate, dtype.itemsize)


def test_a_view_counts_the_whole_storage_that_it_keeps() -> None:
    whole = torch.randn(10, 4)
    assert held([nn.Tanh()], whole[:1].requires_grad_()) == whole.nbytes + 16


def test_a_storage_counts_once_however_often_it_is_saved() -> None:
    class Cube(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * inputs.view(-1).view(inputs.shape) * inputs

    inputs = torch.randn(5, 4, requires_grad=True)
    assert held([Cube()], inputs) == 3 * inputs.nbytes  # the input, its square, and the output


def test_parameters_buffers_and_constants_are_left_out() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.register_buffer("scale", torch.randn(4))
            self.constant = torch.randn(4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * self.weight * self.scale * self.constant

    inputs = torch.randn(3, 4)
    # Saved: the input for the weight's gradient; held: the input and the output.
    assert held([Scaled()], inputs) == 2 * inputs.nbytes


def test_targets_are_older_than_the_step() -> None:
    class Against(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (inputs * target).sum()

    target, inputs = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    assert held([Against()], inputs, older=[target]) == inputs.nbytes + 4
    assert held([Against()], inputs) == inputs.nbytes + target.nbytes + 4


def test_stated_bytes_come_and_go() -> None:
    ledger = Ledger([])
    ledger.add(7)
    ledger.add(-3)
    assert ledger.level_bytes == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_an_optimizers_state_is_what_torch_keeps(name: str, dtype: torch.dtype) -> None:
    layers = [MLPBlock(3, 5, dtype=dtype), nn.LayerNorm(3, dtype=dtype)]
    parameters = list(nn.Sequential(*layers).parameters())
    optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
        "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters),
        "adamw": lambda: torch.optim.AdamW(parameters),
    }[name]()
    assert optimizer_bytes(optimizer, parameters) == 0
    nn.Sequential(*layers)(torch.randn(2, 3, dtype=dtype)).sum().backward()
    optimizer.step()
    trained = sum(parameter.nbytes for parameter in parameters)
    counters = 4 if name.startswith("adam") else 0
    assert optimizer_bytes(optimizer, parameters) == optimizer_state_bytes(name, trained, tensors=len(parameters))
    assert optimizer_bytes(optimizer, parameters) == optimizer_state_bytes(name, trained) + counters * len(parameters)


# On real workers


def levels(config: RunConfig, pool: WorkerPool) -> tuple[list[list[int]], list[list[int]]]:
    """Per rank the bytes after every action: counted, and predicted from a profile of the layers."""
    with Session(config, pool=pool) as session:
        counted = session.count_memory()
        stages = session.profile(1).stages
    predicted = ppsim.simulate(config.pipeline, stages)
    by_rank = [predicted.activation_bytes[list(predicted.program.rows_of(r))].tolist() for r in range(config.ranks)]
    assert all(after[-1] == 0 for after in counted if after), "all is released at the end of the step"
    return counted, by_rank


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches"),
    [(name, 3, 6) for name in ppsim.schedule_names()]
    + [(name, ranks, ranks + 1) for name in ("afab", "afab-eager", "1f1b") for ranks in (1, 2, 4)],
)
def test_the_mlp_holds_what_is_predicted_after_every_action(
    schedule: str, ranks: int, microbatches: int, pool: WorkerPool
) -> None:
    natural = built(schedule, ranks=ranks, microbatches=microbatches)
    ranks = natural.ranks
    sizes = [1 + stage % 3 for stage in range(natural.model_stages)]
    config = tiny(
        schedule=schedule,
        ranks=ranks,
        microbatches=microbatches,
        layers=sum(sizes),
        partition=",".join(map(str, sizes)),
    )
    counted, predicted = levels(config, pool)
    assert counted == predicted


@pytest.mark.parametrize("schedule", ["afab", "afab-eager"])
@pytest.mark.parametrize("sizes", [[3], [1, 3], [2, 1, 1], [1, 2, 1, 3]])
def test_the_mlp_holds_its_closed_form_after_every_action(schedule: str, sizes: list[int], pool: WorkerPool) -> None:
    config = tiny(
        schedule=schedule,
        ranks=len(sizes),
        microbatches=3,
        layers=sum(sizes),
        partition=",".join(map(str, sizes)),
        hidden=6,
        intermediate=10,
        seq=3,
        micro_batch_size=2,
    )
    with Session(config, pool=pool) as session:
        counted = session.count_memory()
    stages = [
        ppsim.StageCost(
            forward_s=0, backward_input_s=0, backward_weight_s=0, activation_bytes=block_bytes(size, 6, 6, 10)
        )
        for size in sizes
    ]
    expected = activation_levels(config.pipeline.program, stages)
    bounds = [0, *accumulate(len(levels) for levels in counted)]
    assert [expected[begin:end].tolist() for begin, end in pairwise(bounds)] == counted
    assert max(map(max, counted)) == max(
        block_bytes(size, 6, 6, 10) * (1 if schedule == "afab-eager" and rank == len(sizes) - 1 else 3)
        for rank, size in enumerate(sizes)
    )


@with_workers
@given(case=cases(keep_inputs=True))
def test_layers_that_keep_their_input_hold_what_is_predicted_after_every_action(
    case: Case, pool: WorkerPool, tmp_path: Path
) -> None:
    counted, predicted = levels(case.config(tmp_path), pool)
    assert counted == predicted


@with_workers
@given(case=cases(odd=True))
def test_every_model_holds_what_is_predicted_after_every_action(case: Case, pool: WorkerPool, tmp_path: Path) -> None:
    """Whatever its layers save, share, cast or view: bytes are profiled on the stage as cut."""
    counted, predicted = levels(case.config(tmp_path), pool)
    assert counted == predicted


FREE = Calibration()  # bytes ask nothing of a clock


def difference(config: RunConfig, pool: WorkerPool) -> dict | None:
    """Where an experiment's columns first differ."""
    return predict_and_measure(config, pool=pool, verify=False, calibration=FREE).summary()["memory"][
        "first_difference"
    ]


@with_workers
@given(case=cases(odd=True), window=st.integers(0, 2))
def test_every_column_is_equal_after_every_action(case: Case, window: int, pool: WorkerPool, tmp_path: Path) -> None:
    """Activations, receive buffers under any window, gradients; and the parameters of every rank."""
    config = case.config(tmp_path)
    if window:
        config = replace(config, receive_window=smallest_receive_window(config.pipeline.program) + window)
    assert difference(config, pool) is None


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_columns_are_counted_for_real(schedule: str, forward_only: bool, pool: WorkerPool) -> None:
    """Not equal because both are nothing: the parameters' closed form, buffers of the messages' size."""
    config = tiny(schedule=schedule, forward_only=forward_only, receive_window=3)
    outcome = predict_and_measure(config, pool=pool, verify=False, calibration=FREE)
    memory = outcome.summary()["memory"]
    assert memory["equal_at_every_action"]
    parameters = 2 * 4 * (2 * 8 * 32 + 32 + 8)
    for clock in ("predicted", "measured"):
        assert memory[clock]["parameter_bytes"] == [parameters] * 2
        assert memory[clock]["gradient_bytes"] == ([0] * 2 if forward_only else [parameters] * 2)
        assert all(0 < held <= 2 * 3 * 64 and held % 64 == 0 for held in memory[clock]["receive_buffer_bytes"][1:])


def test_timed_compute_knows_its_buffers_and_has_no_parameters(pool: WorkerPool) -> None:
    cost = ppsim.StageCost(
        forward_s=1e-4, backward_input_s=1e-4, backward_weight_s=1e-4, activation_bytes=9, output_bytes=100
    )
    outcome = predict_and_measure(tiny(schedule="1f1b"), pool=pool, costs=[cost] * 2, calibration=FREE)
    memory = outcome.summary()["memory"]
    assert memory["equal_at_every_action"]
    assert "parameter_bytes" not in memory["measured"]
    assert max(memory["measured"]["receive_buffer_bytes"]) >= 100


def test_an_evaluation_holds_nothing(pool: WorkerPool) -> None:
    with Session(tiny(forward_only=True), pool=pool) as session:
        assert np.concatenate(session.count_memory()).tolist() == [0] * 8
