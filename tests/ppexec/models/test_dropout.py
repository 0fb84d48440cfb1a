"""Dropout: the same elements are dropped whatever the schedule, the placement, the mesh, and whoever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.models.batch import Batch, load_batch
from ppexec.models.dropout import Randomness, SeededDropout
from ppexec.models.load import load_model
from ppexec.models.seeds import dropout_mask
from ppexec.stage.stage import Stage
from tests.support.factories import newest_outputs, spelled
from tests.support.remote import on_every_rank, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


def dropout(randomness: Randomness, *, drop: float = 0.5, layer: int = 3, site: str = "mlp") -> SeededDropout:
    return SeededDropout(drop, layer=layer, site=site, randomness=randomness)


@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 99),
    samples=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    drop=st.floats(0.05, 0.9),
)
def test_it_is_the_keyed_mask_scaled(seed: int, step: int, samples: list[int], drop: float) -> None:
    randomness = Randomness(seed)
    module = dropout(randomness, drop=drop)
    inputs = torch.randn(len(samples), 3, 8, dtype=torch.float64, requires_grad=True)
    randomness.at(step, samples)
    output = module(inputs)
    mask = dropout_mask(seed, step=step, samples=samples, layer=3, site="mlp", shape=(3, 8), drop=drop)
    torch.testing.assert_close(output, torch.where(mask, inputs / (1 - drop), 0.0), rtol=1e-14, atol=0)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, mask.double() / (1 - drop), rtol=1e-14, atol=0)


def test_a_mask_depends_on_the_sample_and_not_on_its_neighbours() -> None:
    randomness = Randomness(1)
    module, ones = dropout(randomness), torch.ones(4, 32)
    randomness.at(0, range(4, 8))
    together = module(ones)
    for at in range(4):
        randomness.at(0, [4 + at])
        assert torch.equal(module(ones[:1])[0], together[at])


def test_step_layer_site_and_seed_each_draw_another_mask() -> None:
    masks = []
    for seed, step, layer, site in [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]:
        randomness = Randomness(seed)
        randomness.at(step, [0])
        masks.append(tuple(dropout(randomness, layer=layer, site=site)(torch.ones(1, 64))[0].tolist()))
    assert len(set(masks)) == 5


def test_nothing_is_dropped_unless_somebody_says_where_it_is() -> None:
    randomness = Randomness(0)
    module, ones = dropout(randomness), torch.ones(1, 64)
    assert module(ones) is ones
    randomness.at(0, [0])
    assert not torch.equal(module(ones), ones)
    assert dropout(randomness, drop=0.0)(ones) is ones
    randomness.off()
    assert module(ones) is ones


def test_shapes_are_inferred_without_drawing() -> None:
    randomness = Randomness(0)
    randomness.at(0, [0])
    assert dropout(randomness)(torch.ones(7, 3, device="meta")).shape == (7, 3)


def test_another_number_of_samples_is_refused() -> None:
    randomness = Randomness(0)
    randomness.at(0, [0, 1])
    with pytest.raises(ValueError, match="'mlp' of layer 3 is given 5 samples in a microbatch of 2"):
        dropout(randomness)(torch.ones(5, 8))


def test_without_dropout_a_gpt_has_no_randomness_to_ask() -> None:
    model = load_model(tiny(model="gpt"))
    assert model.randomness is None
    assert not any(isinstance(module, SeededDropout) for layer in model.layers for module in layer.modules())


def test_the_dropouts_of_a_gpt_have_a_key_each() -> None:
    model = load_model(tiny(model="gpt", dropout=0.1))
    modules = [module for layer in model.layers for module in layer.modules() if isinstance(module, SeededDropout)]
    assert len(modules) == 1 + 2 * 4
    assert len({(module.layer, module.site) for module in modules}) == len(modules)
    assert all(module.randomness is model.randomness for module in modules)


def test_a_stage_tells_which_step_and_samples_each_microbatch_is_of() -> None:
    randomness = Randomness(5)
    layers = [nn.Identity(), dropout(randomness, layer=1)]
    stage = Stage(1, layers, first_layer=0, loss=None, microbatches=2, trains=True, randomness=randomness)
    stage.begin(Batch(step=9, samples=[range(6, 8), range(2, 4)]))
    for microbatch, samples in ((1, [2, 3]), (0, [6, 7])):
        output = stage.forward(microbatch, torch.ones(2, 64), None)
        mask = dropout_mask(5, step=9, samples=samples, layer=1, site="mlp", shape=(64,), drop=0.5)
        assert torch.equal(output, 2.0 * mask)


def test_every_rank_knows_the_samples_and_replicas_share_them_out() -> None:
    def load(*shares: int, dp_rank: int, reads: bool) -> Batch:
        return load_batch(
            lambda index: (torch.zeros(1), torch.zeros(1)),
            seed=3, step=2, microbatches=shares, samples_of=lambda index: range(3 * index, 3 * index + 3),
            dp_rank=dp_rank,
            has_first=reads, has_last=False, device=torch.device("cpu"),
        )  # fmt: skip

    whole = load(8, dp_rank=0, reads=True)
    assert whole.step == 2
    assert sorted(sample for samples in whole.samples for sample in samples) == list(range(2 * 24, 3 * 24))
    assert load(8, dp_rank=0, reads=False).samples == whole.samples
    assert load(4, 4, dp_rank=0, reads=False).samples + load(4, 4, dp_rank=1, reads=True).samples == whole.samples


# On real workers


def dropped(pool: WorkerPool, **values: Any) -> dict[int, torch.Tensor]:
    """What is left of ones after four dropout layers, by global sample."""
    config = tiny(model=spelled("dropping"), **values)
    with Session(config, pool=pool) as session:
        session.measure(1, first_step=3)
    found: dict[int, torch.Tensor] = {}
    for outputs in on_every_rank(pool, config.world_size, newest_outputs):
        found.update(outputs)
    return found


def test_masks_depend_on_no_schedule_placement_or_mesh(pool: WorkerPool) -> None:
    expected: dict[int, torch.Tensor] = {}
    for sample in range(3 * 4, 4 * 4):
        value = torch.ones(1, 16)
        for layer in range(4):
            mask = dropout_mask(7, step=3, samples=[sample], layer=layer, site="only", shape=(16,), drop=0.3)
            value = value * mask * (1 / (1 - 0.3))
        expected[sample] = value[0]
    for values in (
        {"ranks": 1},
        {"ranks": 2, "schedule": "1f1b"},
        {"ranks": 2, "schedule": "zb-v"},
        {"ranks": 4, "schedule": "zb-h1"},
        {"ranks": 2, "recompute": True},
        {"ranks": 2, "microbatches": 2, "micro_batch_size": 2},
        {"ranks": 2, "dp": 2, "microbatches": 2},
    ):
        found = dropped(pool, **{"microbatches": 4, "seed": 7, **values})
        assert found.keys() == expected.keys(), values
        assert all(torch.equal(found[sample], expected[sample]) for sample in expected), values


@pytest.mark.parametrize("schedule", [name for name in ppsim.schedule_names() if "1f1b" in name or "zb" in name])
def test_gradients_with_dropout_are_bit_equal_to_one_process(schedule: str, pool: WorkerPool) -> None:
    config = tiny(model="gpt", schedule=schedule, dropout=0.25, micro_batch_size=2, seq=3)
    with Session(config, pool=pool) as session:
        session.profile(1)  # leaves nothing behind
        report = session.verify()
    assert report.first_difference is None
    assert report.passed


def test_dropout_changes_what_is_computed() -> None:
    """Else the test above would hold of a dropout that never drops."""
    gradients = []
    for drop in (0.0, 0.25):
        randomness = Randomness(0)
        stage = Stage(1, [dropout(randomness, drop=drop)], first_layer=0, loss=None, microbatches=1, trains=True,
                      randomness=randomness)  # fmt: skip
        stage.begin(Batch(step=0, samples=[range(1)]))
        stage.forward(0, torch.ones(1, 64), None)
        gradients.append(stage.backward(0, torch.ones(1, 64)))
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert not torch.equal(gradients[0], gradients[1])


def test_peers_that_cannot_key_dropout_are_refused(pool: WorkerPool) -> None:
    for values in ({"dropout": 0.1}, {"recompute": True}):
        with (
            Session(tiny(model="gpt", schedule="1f1b", **values), pool=pool) as session,
            pytest.raises(ValueError, match="switch both off to compare"),
        ):
            session.time_steps("torch-1f1b", 1)
    assert ppexec.verify(tiny(model="gpt"), pool=pool).passed
