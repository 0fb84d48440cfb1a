"""Trainings of replicas with different numbers of microbatches: those of the same global batch on one replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ppexec
from ppexec import RunConfig, Session, WorkerPool
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

GPT = {"model": "gpt", "layers": 2, "seq": 8, "tied": True, "dropout": 0.1, "accumulate": 2, "evaluate_every": 2}
ONE = {"dp": 1, "replica_microbatches": "", "microbatches": 9, "ranks": 1}


def mesh(**changes: Any) -> RunConfig:
    """Nine microbatches of a step, or of each round of it, five on one replica and four on the other."""
    values: dict[str, Any] = {"dp": 2, "microbatches": 0, "replica_microbatches": "5,4", "schedule": "1f1b"}
    return tiny(**(values | {"dtype": "float64", "learning_rate": 0.01, "clip_norm": 0.05} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "zb-v"},
        {"schedule": "interleaved-1f1b", "tp": 2, "accumulate": 2},
        {"dp": 3, "ranks": 1, "replica_microbatches": "1,6,2", "accumulate": 3, "shard_optimizer": True},
        {"schedule": "zb-v", "shard": 2, "accumulate": 2},
        {**GPT, "replica_microbatches": "2,7"},
        {**GPT, "schedule": "zb-h1", "shard_optimizer": True},
        {"global_batch_size": 20, "micro_batch_size": 0, "device": "threads"},
    ],
    ids=str,
)
def test_a_training_is_that_of_one_process(pool: WorkerPool, changes: dict[str, Any]) -> None:
    """In float64: sums over dp, tp and tied places run in another order. One loop of PyTorch's own parts is compared
    where all samples count alike, else one replica."""
    config = mesh(**changes)
    report = ppexec.train(config, steps=3, pool=pool)
    one = ppexec.train(
        mesh(**(changes | ONE | {"tp": 1, "shard": 0, "shard_optimizer": False, "device": "cpu"})), steps=3, pool=pool
    )
    expected = plain_training(config, 3) if config.global_batch_size % 9 == 0 else one
    for found in (expected, one):
        assert report.losses == pytest.approx(found.losses, rel=1e-12)
        assert report.gradient_norms == pytest.approx(found.gradient_norms, rel=1e-12)
        assert report.held_out_losses == pytest.approx(found.held_out_losses, rel=1e-12)
    assert len(set(report.losses)) == 3
    assert len(report.held_out_losses) == (1 if config.evaluate_every else 0)


@pytest.mark.parametrize("model", ["uneven", "by_targets", "by_loss"])
def test_every_reduction_of_losses_counts_samples_or_terms_over_all_replicas(pool: WorkerPool, model: str) -> None:
    more = {
        "model": f"tests.ppexec.verification.test_sizes:{model}",
        "layers": 4,
        "evaluate_every": 2,
        "clip_norm": None,
    }
    one = ppexec.train(mesh(**more, **ONE), steps=3, pool=pool)
    for changes in (
        {"ranks": 2},
        {"replica_microbatches": "1,8"},
        {"dp": 3, "ranks": 1, "replica_microbatches": "2,3,4"},
    ):
        report = ppexec.train(mesh(**(more | changes)), steps=3, pool=pool)
        assert report.losses == pytest.approx(one.losses, rel=1e-12)
        assert report.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-12)
        assert report.held_out_losses == pytest.approx(one.held_out_losses, rel=1e-12)


@pytest.mark.parametrize("shares", [False, True])
def test_a_checkpoint_goes_on_with_other_parts_of_the_batch(pool: WorkerPool, tmp_path: Path, shares: bool) -> None:
    with Session(mesh(shard_optimizer=shares), pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path)
        expected = session.train(2).losses
    for changes in ({"replica_microbatches": "1,8", "shard_optimizer": not shares}, ONE, {**ONE, "ranks": 2}):
        found = ppexec.train(mesh(**changes), steps=2, resume=tmp_path, pool=pool)
        assert found.steps == [2, 3]
        assert found.losses == pytest.approx(expected, rel=1e-12)
