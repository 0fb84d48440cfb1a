"""The learning rate of each step, held against PyTorch's schedulers; a resumed training goes on at its point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ppexec
from ppexec import WorkerPool
from ppexec.training.learning_rate import learning_rate
from ppsim.errors import InputError
from tests.support.plain_training import plain_schedule, plain_training
from tests.support.remote import tiny

RATE = {"learning_rate": 0.03}
FALLING = {"learning_rate_decay_steps": 7, "min_learning_rate": 0.004}


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rates_are_those_of_pytorchs_schedulers(decay: str, warmup: int) -> None:
    """They multiply the rate by a factor step by step, 12 times here, where ours is computed at once."""
    falling = {} if decay == "none" else FALLING
    config = tiny(learning_rate_warmup=warmup, learning_rate_decay=decay, **RATE, **falling)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler = plain_schedule(config, optimizer)
    for step in range(warmup + 8):
        assert learning_rate(config, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-13), step
        optimizer.step()
        scheduler.step()
    last = learning_rate(config, warmup + 7)
    assert last == pytest.approx(0.03 if decay == "none" else 0.004)
    assert learning_rate(config, 10**6) == last


def test_a_training_goes_on_at_its_point_of_the_schedule_on_another_mesh(pool: WorkerPool, tmp_path: Path) -> None:
    """In float64: rates differ from PyTorch's by roundings, and each step carries them on."""
    more = {"learning_rate_warmup": 2, "learning_rate_decay": "cosine", "dtype": "float64", **RATE, **FALLING}
    expected = plain_training(tiny(ranks=1, **more), 6)
    first = ppexec.train(tiny(ranks=2, schedule="1f1b", **more), steps=3, save=tmp_path, pool=pool)
    second = ppexec.train(tiny(ranks=1, dp=2, microbatches=2, **more), steps=3, resume=tmp_path, pool=pool)
    assert first.learning_rates + second.learning_rates == pytest.approx(expected.learning_rates, rel=1e-13)
    assert first.losses + second.losses == pytest.approx(expected.losses, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate_decay": "cosine"}, "'cosine' needs learning_rate_decay_steps: give the number of steps after"),
        ({"min_learning_rate": 1e-4}, "min_learning_rate=0.0001 has no meaning without a decay: take"),
        ({"learning_rate_decay_steps": 9}, "learning_rate_decay_steps=9 has no meaning without a decay: take"),
        ({"learning_rate_decay": "linear", "learning_rate_decay_steps": 9, "min_learning_rate": 1.0}, "take at most"),
        ({"learning_rate_warmup": -1}, "learning_rate_warmup must be a whole number of 0 or more, got -1"),
        ({"learning_rate_decay": "step"}, "learning_rate_decay must be one of none, linear, cosine, got 'step'"),
    ],
)
def test_schedules_without_a_meaning_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny(**values)
