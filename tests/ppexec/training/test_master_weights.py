"""Master weights: bfloat16 parameters that are float32 copies rounded, as in one process; saved and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

import ppexec
from ppexec import RunConfig, Session, WorkerPool
from ppexec.models.load import load_model
from ppsim.errors import InputError
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def mesh(dp: int, pp: int, tp: int, **changes: object) -> RunConfig:
    values = {"schedule": "1f1b", "dtype": "bfloat16", "master_weights": True, "learning_rate": 1e-3, **changes}
    return tiny(dp=dp, ranks=pp, tp=tp, microbatches=4 // dp, **values)


def saved(config: RunConfig, folder: str) -> dict[str, torch.Tensor]:
    """Parameters and master weights in a checkpoint, read in one process."""
    found = {}
    for index, layer in enumerate(load_model(config).layers):
        for name, parameter in layer.named_parameters():
            found[f"model.layers.{index}.{name}"] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
            found[f"master.layers.{index}.{name}"] = torch.zeros(parameter.shape, dtype=torch.float32)
    torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    return found


@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "clip_norm": 0.05}], ids=["plain", "accumulated and clipped"])
def test_a_pipeline_alone_has_the_bits_of_one_process(pool: WorkerPool, more: dict[str, Any]) -> None:
    config = mesh(1, 2, 1, **more)
    expected = plain_training(config, 4)
    report = ppexec.train(config, steps=4, pool=pool)
    assert report.losses == expected.losses
    assert report.gradient_norms == expected.gradient_norms


@pytest.mark.parametrize(("dp", "pp", "tp"), [(2, 2, 1), (1, 2, 2)])
def test_every_mesh_trains_as_one_process_within_its_roundings(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    """Losses are bfloat16 numbers of 8 bits, and sums over dp and tp are rounded to 8 bits in another order."""
    config = mesh(dp, pp, tp, clip_norm=0.05)
    expected = plain_training(config, 3)
    report = ppexec.train(config, steps=3, pool=pool)
    assert report.losses == pytest.approx(expected.losses, rel=2**-7)
    assert report.gradient_norms == pytest.approx(expected.gradient_norms, rel=2**-6)


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 2, 1), (2, 2, 2)])
def test_parameters_are_the_saved_copies_rounded(pool: WorkerPool, tmp_path: Path, dp: int, pp: int, tp: int) -> None:
    """The steps are too small for bfloat16, which alone would stay where it is; the copies move."""
    config = mesh(dp, pp, tp, learning_rate=1e-6, weight_decay=0.0)
    start = ppexec.train(mesh(dp, pp, tp, learning_rate=0.0), steps=1, save=tmp_path / "start", pool=pool)
    report = ppexec.train(config, steps=2, save=tmp_path / "end", pool=pool)
    before, after = (saved(config, str(each.checkpoint)) for each in (start, report))
    masters = [key for key in after if key.startswith("master.")]
    for key in masters:
        assert torch.equal(after[key.replace("master.", "model.")], after[key].bfloat16())
        assert (after[key] != before[key]).float().mean() > 0.9


def test_a_checkpoint_goes_on_bit_by_bit_on_another_pipeline(pool: WorkerPool, tmp_path: Path) -> None:
    with Session(mesh(1, 2, 1), pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path)
        expected = session.train(2).losses
    assert ppexec.train(mesh(1, 4, 1), steps=2, resume=tmp_path, pool=pool).losses == expected
    sharded = ppexec.train(mesh(1, 2, 2), steps=2, resume=tmp_path, pool=pool).losses
    assert sharded == pytest.approx(expected, rel=2**-7)


def test_a_checkpoint_with_or_without_them_is_refused_by_the_other(pool: WorkerPool, tmp_path: Path) -> None:
    ppexec.train(mesh(1, 2, 1), steps=1, save=tmp_path / "with", pool=pool)
    ppexec.train(mesh(1, 2, 1, master_weights=False), steps=1, save=tmp_path / "without", pool=pool)
    with pytest.raises(InputError, match="was saved with master_weights: resume with them"):
        ppexec.train(mesh(1, 2, 1, master_weights=False), steps=1, resume=tmp_path / "with", pool=pool)
    with pytest.raises(InputError, match="was saved without master_weights: resume without them, or start anew"):
        ppexec.train(mesh(1, 2, 1), steps=1, resume=tmp_path / "without", pool=pool)


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 2, 1), (1, 2, 2)])
def test_the_optimizer_takes_12_bytes_for_each_weight(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    """A copy and two moments of 4 bytes each, and a counter of 4 bytes for each tensor; by hand for the MLP."""
    config = mesh(dp, pp, tp)
    with Session(config, pool=pool) as session:
        session.train(1)
        found = [rank.optimizer_bytes for rank in session.memory()]
    blocks = config.layers // pp
    weights = blocks * (8 * 32 // tp + 32 // tp + 32 * 8 // tp + 8)
    assert found == [12 * weights + 4 * 4 * blocks] * pp


def test_they_have_no_meaning_for_other_types() -> None:
    with pytest.raises(
        InputError, match=r"no meaning with dtype 'float32', .*: take --dtype bfloat16, or leave it out"
    ):
        tiny(master_weights=True)
