"""Training with sharded parameters: the bits of a training without, and a share of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ppexec
from ppexec import RunConfig, Session, WorkerPool
from ppsim import build_schedule
from ppsim.errors import InputError
from tests.support.checkpoints import held
from tests.support.factories import spelled
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def mesh(dp: int, pp: int, **changes: Any) -> RunConfig:
    values = {"schedule": "1f1b", "learning_rate": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1, "microbatches": 4}
    return tiny(dp=dp, ranks=pp, **(values | changes))


CASES = [
    ((2, 2), {"shard": 1}),
    ((2, 2), {"schedule": "zb-v", "shard": 1}),
    ((2, 1), {"schedule": "interleaved-1f1b", "stages_per_rank": 2, "shard": 1, "hidden": 5, "intermediate": 7}),
    ((2, 2), {"shard": 1, "accumulate": 2}),
    ((2, 2), {"shard": 1, "dtype": "bfloat16", "master_weights": True}),
    ((2, 2), {"shard": 2, "model": "gpt", "layers": 2, "hidden": 16, "seq": 8, "dropout": 0.1}),
    ((2, 2), {"shard": 1, "evaluate_every": 2, "evaluate_steps": 2}),
    ((2, 2), {"shard": 1, "model": "gpt", "tied": True, "layers": 2, "hidden": 16, "seq": 8}),
    (
        (2, 1),
        {
            "shard": 1,
            "model": "gpt",
            "tied": True,
            "layers": 2,
            "hidden": 16,
            "seq": 8,
            "schedule": "interleaved-1f1b",
            "stages_per_rank": 2,
        },
    ),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("at", "changes"), CASES, ids=str)
def test_a_training_has_the_bits_of_one_without(
    pool: WorkerPool, tmp_path: Path, at: tuple[int, int], changes: dict[str, Any]
) -> None:
    """With two replicas: two numbers have one sum in any order."""
    found = [
        ppexec.train(mesh(*at, **(changes | {"shard": shard})), steps=4, save=tmp_path / str(shard), pool=pool)
        for shard in (0, changes["shard"])
    ]
    assert len(set(found[0].losses)) == 4  # it trains at all
    for name in ("losses", "gradient_norms", "held_out_losses", "evaluated", "learning_rates"):
        assert getattr(found[0], name) == getattr(found[1], name), name
    whole = [held(str(each.checkpoint)) for each in found]
    assert whole[0].keys() == whole[1].keys()
    assert all(torch.equal(whole[0][key], whole[1][key]) for key in whole[0])
    assert any("exp_avg_sq" in key for key in whole[0])


def test_offloaded_and_sharded_training_has_the_bits_of_a_plain_one(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "moved.csv"
    built = build_schedule("interleaved-1f1b", ranks=2, microbatches=4).with_recompute(share=0.5).with_offload()
    path.write_text(built.to_csv(offload=True))
    plain = ppexec.train(mesh(2, 2, schedule="interleaved-1f1b", stages_per_rank=2), steps=3, pool=pool)
    for shard in (0, 1):
        moved = ppexec.train(mesh(2, 2, from_csv=path, shard=shard), steps=3, pool=pool)
        assert (moved.losses, moved.gradient_norms) == (plain.losses, plain.gradient_norms)


@pytest.mark.parametrize("kinds", [["frozen", "linear"], ["linear", "frozen"]], ids=str)
def test_frozen_weights_are_gathered_and_not_reduced(pool: WorkerPool, kinds: list[str]) -> None:
    """Stages of 8 x 8 weights and 8 biases; of a frozen one no gradient is there to share."""
    layers = [[kind, 8, "float32"] if kind == "frozen" else [kind, 8, 8, "float32"] for kind in kinds]
    values = {"model": spelled("chain", shape=[2, 8], integers=False, layers=layers), "layers": 2}
    found = [ppexec.train(mesh(2, 2, shard=shard, **values), steps=3, pool=pool) for shard in (0, 1)]
    assert found[0].losses == found[1].losses
    assert found[0].gradient_norms == found[1].gradient_norms
    outcome = ppexec.predict_and_measure(mesh(2, 2, shard=1, **values), pool=pool)
    assert outcome.summary()["memory"]["first_difference"] is None
    assert outcome.collectives.gradient_share_bytes == tuple(0 if k == "frozen" else 4 * 36 for k in kinds)
    assert outcome.collectives.parameter_share_bytes == (4 * 36,) * 2


def test_more_replicas_train_as_one_process_within_rounding(pool: WorkerPool) -> None:
    """Three replicas, and tensors of 2 and 8 rows: some have fewer rows than there are replicas."""
    config = mesh(3, 1, shard=1, hidden=2, dtype="float64")
    expected = plain_training(config, 3)
    report = ppexec.train(config, steps=3, pool=pool)
    assert report.losses == pytest.approx(expected.losses, rel=1e-12)
    assert report.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-12)


def test_a_checkpoint_goes_on_on_any_mesh(pool: WorkerPool, tmp_path: Path) -> None:
    values = {"dtype": "float64", "layers": 4, "hidden": 2}
    with Session(mesh(2, 2, shard=1, **values), pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path / "shares")
        expected = session.train(2).losses
    assert ppexec.train(mesh(2, 2, **values), steps=2, resume=tmp_path / "shares", pool=pool).losses == expected
    for config in (
        mesh(4, 1, shard=1, microbatches=2, **values),  # tensors of two rows: two replicas have none of them
        mesh(1, 2, microbatches=8, **values),
        mesh(1, 2, tp=2, microbatches=8, **values),
        mesh(2, 2, shard_optimizer=True, **values),
    ):
        found = ppexec.train(config, steps=2, resume=tmp_path / "shares", pool=pool)
        assert found.losses == pytest.approx(expected, rel=1e-12)
        with Session(config, pool=pool) as session:
            assert session.load_checkpoint(tmp_path / "shares") == 2
            session.save_checkpoint(tmp_path / "again")
        if config.shard or config.shard_optimizer:
            again = mesh(2, 2, shard=1, **values)
            assert ppexec.train(again, steps=2, resume=tmp_path / "again", pool=pool).losses == expected


def test_a_replica_holds_its_share_of_everything(pool: WorkerPool) -> None:
    """By hand for the MLP: two moments for each of its weights, of which it has a half, and 4 bytes for each tensor."""
    config = mesh(2, 2, shard=1)
    with Session(config, pool=pool) as session:
        session.train(1)
        ranks = session.memory()
    blocks = config.layers // 2
    weights = blocks * (8 * 32 + 32 + 32 * 8 + 8) // 2
    assert [rank.parameter_bytes for rank in ranks] == [4 * weights] * 2
    assert [rank.optimizer_bytes for rank in ranks] == [2 * 4 * weights + 4 * 4 * blocks] * 2


def test_nudged_shares_are_the_shares_of_nudged_weights(pool: WorkerPool, tmp_path: Path) -> None:
    saved = []
    for shard in (0, 1):
        with Session(mesh(2, 2, shard=shard, learning_rate=0.0, weight_decay=0.0), pool=pool) as session:
            session.nudge()
            session.train(1)
            saved.append(held(str(session.save_checkpoint(tmp_path / str(shard)))))
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_a_sharded_optimizer_has_nothing_left_to_share() -> None:
    with pytest.raises(InputError, match="shard_optimizer True does not go with sharded parameters: take shard_optimi"):
        mesh(2, 2, shard=1, shard_optimizer=True)
