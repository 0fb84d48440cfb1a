"""Evaluations in a training: equal to one process, and nothing that the training notices."""

from __future__ import annotations

import pytest

import ppexec
from ppexec import RunConfig, WorkerPool
from ppsim.errors import InputError
from tests.support.factories import spelled
from tests.support.plain_training import plain_training
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

GPT = {"model": "gpt", "layers": 2, "seq": 8, "dropout": 0.2, "tied": True}


def mesh(dp: int, pp: int, tp: int, **changes: object) -> RunConfig:
    values = {"schedule": "1f1b", "learning_rate": 0.01, "evaluate_every": 2, "evaluate_steps": 2, **changes}
    return tiny(dp=dp, ranks=pp, tp=tp, microbatches=4 // dp, **values)


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)])
def test_held_out_losses_are_those_of_one_process_on_every_mesh(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    """In float64: the parameters evaluated differ by the roundings of sums over dp, tp and tied places."""
    config = mesh(dp, pp, tp, dtype="float64", accumulate=2, **GPT)
    expected = plain_training(config, 5)
    report = ppexec.train(config, steps=5, pool=pool)
    assert report.evaluated == [1, 3]
    assert report.held_out_losses == pytest.approx(expected.held_out_losses, rel=1e-12)
    assert report.losses == pytest.approx(expected.losses, rel=1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "interleaved-1f1b"])
@pytest.mark.parametrize("model", ["layers that draw", "gpt"])
def test_a_training_has_the_same_bits_with_evaluations(pool: WorkerPool, schedule: str, model: str) -> None:
    """Dropout of both kinds, in place too, split backwards, and several stages of one rank."""
    layers = [["linear", 8, 8], ["dropout"], ["linear", 8, 8], ["dropout_"], ["norm", 8], ["tanh"], ["linear", 8, 4]]
    drawing = spelled(
        "chain", shape=[2, 8], integers=False, layers=[[*layer, "float32"] for layer in [*layers, ["dropout"]]]
    )
    more = {"model": drawing, "layers": 8} if model == "layers that draw" else {**GPT, "layers": 4, "recompute": True}
    config = mesh(1, 2, 1, schedule=schedule, **more)
    found = ppexec.train(config, steps=4, pool=pool)
    plain = ppexec.train(mesh(1, 2, 1, schedule=schedule, evaluate_every=0, **more), steps=4, pool=pool)
    assert found.losses == plain.losses
    assert found.gradient_norms == plain.gradient_norms
    assert len(found.held_out_losses) == 2
    assert model != "gpt" or found.held_out_losses[0] != found.held_out_losses[1]
    assert plain.held_out_losses == plain.evaluated == []


def test_layers_are_in_evaluation_mode_and_get_their_own_back(pool: WorkerPool) -> None:
    """A batch norm whose statistics an evaluation must neither take nor change, and one that is always frozen."""
    config = mesh(1, 2, 1, model=spelled("norms"), dtype="float64", accumulate=2)
    expected = plain_training(config, 4)
    report = ppexec.train(config, steps=4, pool=pool)
    assert report.losses == pytest.approx(expected.losses, rel=1e-12)
    assert report.held_out_losses == pytest.approx(expected.held_out_losses, rel=1e-12)


def test_a_model_may_have_held_out_data_of_its_own(pool: WorkerPool) -> None:
    """Numbers count from 0 there; its targets tell that these were read."""
    config = mesh(2, 2, 1, model=spelled("with_held_out", target=1e3), learning_rate=0.0, evaluate_steps=3)
    report = ppexec.train(config, steps=2, pool=pool)
    assert report.held_out_losses == plain_training(config, 2).held_out_losses
    assert report.held_out_losses[0] > 1e5 > report.losses[1]


def test_counts_without_a_meaning_are_refused() -> None:
    with pytest.raises(InputError, match="evaluate_every must be a whole number of 0 or more, got -1"):
        tiny(evaluate_every=-1)
    with pytest.raises(InputError, match="evaluate_steps must be a whole number of 1 or more, got 0"):
        tiny(evaluate_steps=0)
