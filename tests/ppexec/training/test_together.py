"""All that a training has, at the same time: on every kind of mesh and schedule, and over a move between them."""

from __future__ import annotations

from pathlib import Path

import pytest

import ppexec
from ppexec import RunConfig, WorkerPool
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

TRAINING = {
    "model": "gpt",
    "tied": True,
    "dropout": 0.1,
    "dtype": "float64",
    "accumulate": 2,
    "clip_norm": 0.5,
    "learning_rate": 0.01,
    "learning_rate_warmup": 2,
    "learning_rate_decay": "cosine",
    "learning_rate_decay_steps": 3,
    "min_learning_rate": 0.001,
    "evaluate_every": 2,
    "evaluate_steps": 2,
}


def run(dp: int, pp: int, tp: int, schedule: str, **more: object) -> RunConfig:
    return tiny(dp=dp, ranks=pp, tp=tp, schedule=schedule, microbatches=4 // dp, **TRAINING, **more)


WAYS = [
    ((2, 2, 1, "zb-h1", {}), (1, 2, 2, "1f1b", {"recompute": True})),
    ((1, 2, 2, "interleaved-1f1b", {}), (1, 2, 1, "zb-v", {"backend": "local", "device": "threads"})),
    ((1, 2, 1, "dualpipe-v", {"device": "threads"}), (2, 1, 2, "afab", {})),
]


@pytest.mark.parametrize(("before", "after"), WAYS)
def test_a_whole_training_and_its_second_half_elsewhere_are_those_of_one_process(
    pool: WorkerPool, tmp_path: Path, before: tuple[object, ...], after: tuple[object, ...]
) -> None:
    """In float64: sums over dp, tp and tied places run in another order, and six steps carry their roundings on."""
    first, second = (run(*at[:4], **at[4]) for at in (before, after))  # type: ignore[arg-type]
    expected = plain_training(run(1, 1, 1, "1f1b"), 6)
    begun = ppexec.train(first, steps=3, save=tmp_path, pool=pool)
    ended = ppexec.train(second, steps=3, resume=tmp_path, pool=pool)
    assert begun.losses + ended.losses == pytest.approx(expected.losses, rel=1e-11)
    assert begun.gradient_norms + ended.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-11)
    assert begun.learning_rates + ended.learning_rates == pytest.approx(expected.learning_rates, rel=1e-13)
    assert begun.evaluated + ended.evaluated == [1, 3, 5]
    assert begun.held_out_losses + ended.held_out_losses == pytest.approx(expected.held_out_losses, rel=1e-11)
