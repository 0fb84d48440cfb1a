"""Sharded optimizer: the bits of a training in which each replica updates all, and a part of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ppexec
from ppexec import RunConfig, Session, WorkerPool
from ppexec.training.sharded_optimizer import owners
from ppsim.errors import InputError
from tests.support.checkpoints import held
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def mesh(dp: int, pp: int, tp: int, **changes: Any) -> RunConfig:
    values = {"schedule": "1f1b", "learning_rate": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1, "microbatches": 4}
    return tiny(dp=dp, ranks=pp, tp=tp, **(values | changes))


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        ((2, 2, 1), {}),
        ((3, 1, 1), {"schedule": "zb-h1", "accumulate": 2}),
        ((2, 2, 2), {}),
        ((2, 2, 1), {"dtype": "bfloat16", "master_weights": True}),
        ((2, 2, 1), {"model": "gpt", "layers": 2, "hidden": 16, "seq": 8, "tied": True}),
    ],
    ids=str,
)
def test_a_training_has_the_bits_of_one_that_does_not_share(
    pool: WorkerPool, tmp_path: Path, at: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    found = [
        ppexec.train(mesh(*at, **changes, shard_optimizer=shares), steps=4, save=tmp_path / str(shares), pool=pool)
        for shares in (False, True)
    ]
    assert found[0].losses == found[1].losses
    assert found[0].gradient_norms == found[1].gradient_norms
    assert len(set(found[0].losses)) == 4  # it trains at all
    saved = [held(str(each.checkpoint)) for each in found]
    assert saved[0].keys() == saved[1].keys()  # every moment and master is saved, each by its owner
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("dp", [2, 4])
def test_a_replica_holds_its_part_of_the_state(pool: WorkerPool, dp: int) -> None:
    """By hand for the MLP: two moments for the tensors of the first replica, and a counter of 4 bytes for each."""
    sizes = [8 * 32, 32, 32 * 8, 8] * 4  # of the layers of a tiny MLP
    found = owners([nn.Parameter(torch.zeros(size)) for size in sizes], dp)
    own = [size for size, owner in zip(sizes, found, strict=True) if owner == 0]
    with Session(mesh(dp, 1, 1, layers=4, dtype="float32", shard_optimizer=True), pool=pool) as session:
        session.train(1)
        (rank,) = session.memory()
    assert rank.optimizer_bytes == 2 * 4 * sum(own) + 4 * len(own)
    assert 0.9 < sum(own) / (sum(sizes) / dp) < 1.1


def test_a_checkpoint_goes_on_with_and_without_sharing(pool: WorkerPool, tmp_path: Path) -> None:
    with Session(mesh(2, 2, 1, shard_optimizer=True), pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path)
        expected = session.train(2).losses
    for shares in (False, True):
        config = mesh(2, 2, 1, shard_optimizer=shares)
        assert ppexec.train(config, steps=2, resume=tmp_path, pool=pool).losses == expected
    more = ppexec.train(mesh(4, 1, 1, microbatches=2, shard_optimizer=True), steps=2, resume=tmp_path, pool=pool).losses
    assert more == pytest.approx(expected, rel=1e-12)


@given(sizes=st.lists(st.integers(1, 1000), max_size=20), replicas=st.integers(1, 6))
def test_parts_are_as_even_as_the_largest_tensor_allows(sizes: list[int], replicas: int) -> None:
    found = owners([nn.Parameter(torch.zeros(size)) for size in sizes], replicas)
    held = [sum(size for size, owner in zip(sizes, found, strict=True) if owner == each) for each in range(replicas)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes, default=0)


def test_one_replica_has_nothing_to_share_with() -> None:
    with pytest.raises(InputError, match="shard_optimizer is over data-parallel replicas: take dp 2 or more"):
        tiny(shard_optimizer=True)
