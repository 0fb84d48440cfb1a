"""Optimizer steps as people take them: accumulated, clipped and held to finite numbers, each equal to one process."""

from __future__ import annotations

from dataclasses import replace
from math import isinf, isnan

import pytest

import ppexec
from ppexec import RunConfig, Session, WorkerPool
from ppsim.errors import InputError, RunError
from tests.support.factories import spelled
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

MESHES = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)]
CLIPS = 0.5  # below the norms of these models
GPT = {"model": "gpt", "layers": 2, "tied": True, "seq": 8, "clip_norm": CLIPS}


def mesh(dp: int, pp: int, tp: int, **changes: object) -> RunConfig:
    """The same optimizer step on every mesh: two rounds of four microbatches over all replicas."""
    values = {"schedule": "1f1b", "dtype": "float64", "learning_rate": 0.01, "accumulate": 2, **changes}
    return tiny(dp=dp, ranks=pp, tp=tp, microbatches=4 // dp, **values)


@pytest.mark.parametrize(("dp", "pp", "tp"), MESHES)
@pytest.mark.parametrize("more", [{"clip_norm": 0.02}, GPT], ids=["mlp", "tied gpt"])
def test_accumulated_and_clipped_steps_are_those_of_one_process_on_every_mesh(
    pool: WorkerPool, dp: int, pp: int, tp: int, more: dict[str, object]
) -> None:
    """In float64: sums over dp and tp run in another order, 2**-53 of each term, which three steps carry on."""
    config = mesh(dp, pp, tp, **more)
    expected = plain_training(config, 3)
    assert min(expected.gradient_norms) > float(str(more["clip_norm"]))
    report = ppexec.train(config, steps=3, pool=pool)
    assert report.losses == pytest.approx(expected.losses, rel=1e-12)
    assert report.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_pipeline_alone_has_the_bits_of_one_process(pool: WorkerPool, dtype: str) -> None:
    """1F1B adds up microbatches in their order, and norms are taken parameter by parameter as PyTorch does."""
    config = mesh(1, 2, 1, dtype=dtype, clip_norm=0.02)
    expected = plain_training(config, 3)
    report = ppexec.train(config, steps=3, pool=pool)
    assert report.losses == expected.losses
    assert report.gradient_norms == expected.gradient_norms


@pytest.mark.parametrize(("dp", "pp", "tp"), [(2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_rounds_are_the_same_step_as_one_longer_round(
    pool: WorkerPool, dp: int, pp: int, tp: int, schedule: str
) -> None:
    """The same microbatches in the same order, with the same dropout, so the same bits."""
    more = {**GPT, "dropout": 0.1, "dtype": "float32", "schedule": schedule}
    rounds = mesh(dp, pp, tp, **more, recompute=True)
    longer = tiny(dp=dp, ranks=pp, tp=tp, microbatches=8 // dp, learning_rate=0.01, recompute=True, **more)
    found, expected = (ppexec.train(config, steps=2, pool=pool) for config in (rounds, longer))
    assert found.losses == expected.losses
    assert found.gradient_norms == expected.gradient_norms


def test_what_is_not_clipped_is_not_changed(pool: WorkerPool) -> None:
    plain, wide = (ppexec.train(mesh(1, 2, 1, clip_norm=norm), steps=2, pool=pool) for norm in (None, 1e9))
    assert plain.losses == wide.losses
    assert plain.losses[1] != ppexec.train(mesh(1, 2, 1, clip_norm=1e-3), steps=2, pool=pool).losses[1]


def odd(dp: int, pp: int, tp: int, **changes: object) -> RunConfig:
    """A training whose second step has a loss that is no number."""
    return mesh(dp, pp, tp, model=spelled("odd_loss", at=11), schedule="1f1b", **changes)


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 2, 1), (2, 2, 1)])
def test_a_loss_that_is_not_finite_ends_the_training_and_is_named(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    with Session(odd(dp, pp, tp), pool=pool) as session:
        with pytest.raises(
            RunError, match=r"^step 1: the loss of microbatch 11 \(what sample\(11\) gives\) is inf; "
        ) as e:
            session.train(3)
        assert not isinstance(e.value, InputError)
        assert session.next_step == 1  # nothing was updated, and the workers are there


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 2, 1), (2, 2, 1), (1, 2, 2)])
def test_a_step_that_is_not_finite_is_skipped_as_one_process_skips_it(
    pool: WorkerPool, dp: int, pp: int, tp: int
) -> None:
    config = odd(dp, pp, tp, skip_nonfinite=True, clip_norm=CLIPS)
    expected = plain_training(config, 3)
    report = ppexec.train(config, steps=3, pool=pool)
    assert report.skipped == [1]
    assert isinf(report.losses[1])
    assert isnan(report.gradient_norms[1])
    assert report.losses[2] == pytest.approx(expected.losses[2], rel=1e-12)
    values = report.to_dict()
    assert values["losses"][1] is values["gradient_norms"][1] is None
    assert values["losses"][0] == report.losses[0]


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 2, 1), (2, 2, 1), (1, 1, 2)])
def test_a_gradient_that_is_not_finite_is_named(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    """The loss is a number there; of the four layers the third has no slope, so the first three have no gradient."""
    config = mesh(dp, pp, tp, model=spelled("with_one", kind="Steep", at=2))
    stage = 2 * pp // 4
    said = (
        rf"^step 0: the gradient of layer 2 bias \(stage {stage}\) is not finite, and those of 5 parameters "
        r"earlier in the chain; "
    )
    with pytest.raises(RunError, match=said):
        ppexec.train(config, steps=1, pool=pool)


def test_a_norm_that_overflows_is_none_that_is_not_finite(pool: WorkerPool) -> None:
    """Gradients of 1e30 have squares beyond float32; they are clipped to the same direction, not to zero."""
    config = mesh(1, 2, 1, model=spelled("with_one", kind="Loud", at=3), dtype="float32", clip_norm=1.0)
    report = ppexec.train(config, steps=2, pool=pool)
    assert 1e25 < report.gradient_norms[0] < 1e38
    still = ppexec.train(replace(config, learning_rate=0.0), steps=2, pool=pool)
    assert report.losses[0] == still.losses[0]
    assert report.losses[1] != still.losses[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"accumulate": 0}, "accumulate must be a whole number of 1 or more, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be a number above 0, got 0.0: leave it out to clip nothing"),
        ({"clip_norm": float("inf")}, "clip_norm must be a number above 0, got inf: leave it out"),
    ],
)
def test_values_without_a_meaning_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny(**values)
