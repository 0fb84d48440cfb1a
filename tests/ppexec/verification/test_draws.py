"""Draws: a model with its own nn.Dropout, or any draw from PyTorch's generators, drops the same wherever it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ppexec
from ppexec import Model, RunConfig, WorkerPool
from ppexec.stage.draws import Draws
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


class Noise(nn.Module):
    """Draws without being a dropout module."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + torch.randn_like(value) / 8


def drawing(config: RunConfig) -> Model:
    """Dropout, noise, and a loss that draws."""
    width = config.hidden

    def layer(at: int) -> nn.Module:
        last = [nn.Dropout(0.4), Noise(), nn.Identity()][at % 3]
        return nn.Sequential(nn.Linear(width, width), last)

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(index))
        return both[0], both[1]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(nn.functional.dropout(output, 0.2), target)

    return Model(layers=[layer(at) for at in range(config.layers)], sample=sample, loss=loss)


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"dp": 2}, {"backend": "local", "device": "threads"}])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_the_pipeline_draws_what_one_process_draws(pool: WorkerPool, schedule: str, changes: dict[str, Any]) -> None:
    config = tiny(model=f"{__name__}:drawing", layers=8, schedule=schedule, **changes)
    report = ppexec.verify(config, pool=pool)
    assert report.outputs_bit_equal, report.first_difference
    assert report.passed, report.first_difference


def test_an_evaluation_drops_nothing(pool: WorkerPool) -> None:
    assert ppexec.verify(tiny(model=f"{__name__}:drawing", layers=8, forward_only=True), pool=pool).passed


def test_draws_depend_on_step_sample_and_layer_and_leave_the_generator_as_it_was() -> None:
    draws, ones = Draws(3), torch.ones(64)
    found = {}
    state = torch.get_rng_state()
    for step in range(2):
        for sample in range(2):
            for layer in range(2):
                draws.at(step, range(sample, sample + 1))
                found[step, sample, layer] = tuple(draws.call(layer, nn.Dropout(0.5), ones).tolist())
    assert len(set(found.values())) == 8
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_does_not_draw_is_left_alone() -> None:
    draws = Draws(0)
    draws.at(0, [0])
    draws.call(0, nn.ReLU(), torch.ones(2))
    first, second = (draws.call(0, nn.Dropout(0.5), torch.ones(64)) for _ in range(2))
    assert not torch.equal(first, second)
