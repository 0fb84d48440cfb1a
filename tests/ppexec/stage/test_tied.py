"""Tied embeddings: two copies of one weight start alike, get the same gradient, and stay one weight."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import ppexec
from ppexec import WorkerPool
from ppexec.models.gpt import next_byte_loss
from ppexec.models.load import load_model
from ppexec.stage.build import build_stage
from ppexec.stage.stage import Stage
from ppexec.stage.tied import SharedWeights, build_layers
from ppexec.verification.tasks import verify as verify_step
from tests.support.factories import kept_gradients, spelled
from tests.support.launching import torchrun
from tests.support.remote import on_every_rank, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

CPU = torch.device("cpu")


def small(**changes: Any) -> ppexec.RunConfig:
    return tiny(**{"model": "gpt", "heads": 2, "seq": 5, "tied": True, **changes})


def stages_of(config: ppexec.RunConfig, *cuts: range) -> list[Stage]:
    model = load_model(config)
    return [
        build_stage(at, model, cut, is_last=cut.stop == 6, microbatches=1, trains=True, seed=config.seed, device=CPU)
        for at, cut in enumerate(cuts)
    ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_copies_start_alike_whichever_stage_is_made_first(order: tuple[int, int]) -> None:
    model, cuts, made = load_model(small(seed=3)), [range(3), range(3, 6)], {}
    for at in order:
        made[at] = build_stage(
            at, model, cuts[at], is_last=at == 1, microbatches=1, trains=True, seed=3, device=CPU
        )  # fmt: skip
    copies = [made[0].layers[0].tokens.weight, made[1].layers[-1].logits.weight]
    assert torch.equal(*copies)
    assert copies[0] is not copies[1]
    assert copies[0].std().item() == pytest.approx(0.02, rel=0.1)


def test_the_rest_starts_as_without_tying() -> None:
    for tied, free in zip(stages_of(small(), range(6)), stages_of(small(tied=False), range(6)), strict=True):
        for layer, other in zip(tied.layers, free.layers, strict=True):
            for (name, one), two in zip(layer.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(one, two) == (name != "logits.weight"), name


def test_places_of_one_stage_are_one_parameter_and_those_of_several_are_not() -> None:
    (whole,) = stages_of(small(), range(6))
    assert whole.layers[0].tokens.weight is whole.layers[5].logits.weight
    assert sum(1 for parameter in whole.parameters if parameter is whole.layers[0].tokens.weight) == 1


def test_one_process_has_one_parameter_and_knows_how_large_its_terms_are() -> None:
    config = small(dtype="float64")
    model = load_model(config)
    layers = [layer for cut in (range(3), range(3, 6)) for layer in build_layers(model, cut, seed=0, device=CPU)]
    shared = SharedWeights(layers, model.tied, stage_of=[0, 0, 0, 1, 1, 1])
    weight = layers[0].tokens.weight
    assert shared.place(5, "logits.weight") == (0, "tokens.weight")
    assert "logits.weight" not in dict(layers[5].named_parameters())
    # By hand: the same network with two leaves, whose gradients are the two terms.
    free = weight.detach().clone().requires_grad_()
    inputs, target = load_model(config).sample(0)
    shared.renew()
    next_byte_loss(nn.Sequential(*layers)(inputs), target).backward()
    total, magnitude = weight.grad.clone(), shared.magnitude((0, "tokens.weight"))
    assert magnitude is not None
    value = nn.Sequential(*layers[:5])(inputs)
    loss = next_byte_loss(layers[5].norm(value) @ free.T, target)
    embedding, head = torch.autograd.grad(loss, [weight, free])
    torch.testing.assert_close(total, embedding + head, rtol=1e-12, atol=1e-15)
    terms = embedding.abs() + head.abs()
    assert (magnitude >= terms * (1 - 1e-12)).all()
    assert (magnitude <= 3 * terms * (1 + 1e-12)).all()


def test_a_chain_with_one_weight_at_several_places_can_be_collected() -> None:
    """Autograd holds the hooks on the weight's views; they must not hold the chain, nor its other views, in turn."""
    layers = [nn.Linear(2, 2) for _ in range(3)]
    shared = SharedWeights(layers, [[(at, "weight") for at in range(3)]], stage_of=[0, 1, 2])
    shared.renew()
    nn.Sequential(*layers)(torch.ones(1, 2)).sum().backward()
    kept = [weakref.ref(layer) for layer in layers]
    del layers, shared
    gc.collect()
    assert [each() for each in kept] == [None] * 3


# On real workers


@pytest.mark.parametrize(
    "values",
    [
        {"ranks": 2, "schedule": "1f1b"},
        {"ranks": 2, "schedule": "zb-v"},  # both stages on rank 0
        {"ranks": 3, "schedule": "zb-h1", "layers": 3},  # a rank with neither
        {"ranks": 2, "schedule": "interleaved-1f1b", "dropout": 0.2, "recompute": True},
        {"ranks": 2, "dp": 2, "microbatches": 2},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_copies_have_the_reference_gradient_within_roundings(
    values: dict[str, Any], dtype: str, pool: WorkerPool
) -> None:
    report = ppexec.verify(small(**values, dtype=dtype), pool=pool)
    assert report.outputs_bit_equal
    assert report.gradients_equal
    assert report.max_gradient_diff <= report.tolerance
    assert 0 < report.tolerance < (1e-4 if dtype == "float32" else 1e-12)


def test_one_stage_with_both_places_has_the_reference_gradient_bit_by_bit(pool: WorkerPool) -> None:
    report = ppexec.verify(small(ranks=1), pool=pool)
    assert report.gradients_bit_equal
    assert report.tolerance == 0


def test_every_other_gradient_is_bit_equal_and_the_copies_are_equal_to_each_other(pool: WorkerPool) -> None:
    config = small(model=spelled("kept_gpt"), schedule="zb-h1", layers=6)
    with ppexec.Session(config, pool=pool) as session:
        session.measure(1)
    gradients = [found for rank in on_every_rank(pool, 2, kept_gradients) for found in rank.items()]
    by_place = dict(gradients)
    assert torch.equal(by_place[0, "tokens.weight"], by_place[5, "logits.weight"])
    with ppexec.Session(config, pool=pool) as session:
        comparisons = [c for rank in session._workers.call(verify_step) for c in rank if c.what == "gradient"]
    different = {(c.layer, c.name) for c in comparisons if not c.bit_equal}
    assert different <= {(0, "tokens.weight"), (5, "logits.weight")}
    assert {(c.layer, c.name) for c in comparisons if c.tolerance} == {(0, "tokens.weight"), (5, "logits.weight")}


def test_under_torchrun_too() -> None:
    done = torchrun(
        2, "verify --model gpt --tied --layers 2 --hidden 8 --seq 4 --microbatches 4 --schedule 1f1b --json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["gradients_equal"] is True
    assert report["tolerance"] > 0
