"""Gradients of any mesh are those of one process: dp x pp x tp, schedule, microbatches, partition, seed and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ppexec
from ppexec import RunConfig, WorkerPool
from ppexec.models.load import load_model
from ppexec.verification.reference import Reference
from ppexec.verification.rounding import allowed, nudged, sharded_roundings
from tests.support.chains import chains, named_schedules
from tests.support.remote import tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

MOST_WORKERS = 8


@st.composite
def meshes(draw: st.DrawFn) -> dict[str, Any]:
    """The values of a configuration of at most eight workers."""
    # Copies of the model take neither dp nor tp; tests of their own run them.
    schedule = draw(named_schedules(max_ranks=4, max_microbatches=5).filter(lambda found: found.copies == 1))
    tp = draw(st.integers(1, MOST_WORKERS // schedule.ranks).filter(lambda n: n <= 4))
    dp = draw(st.integers(1, min(MOST_WORKERS // schedule.ranks // tp, 4)))
    sizes = draw(st.lists(st.integers(1, 2), min_size=schedule.stages, max_size=schedule.stages))
    values: dict[str, Any] = {
        "dp": dp,
        "ranks": schedule.ranks,
        "tp": tp,
        "schedule": schedule.name,
        "microbatches": schedule.microbatches,
        "layers": sum(sizes),
        "partition": ",".join(map(str, sizes)),
        "seed": draw(st.integers(0, 2**32)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
    }
    if dp > 1 and draw(st.booleans()):
        shares = draw(st.lists(st.integers(1, schedule.microbatches), min_size=dp - 1, max_size=dp - 1))
        shares.insert(draw(st.integers(0, dp - 1)), schedule.microbatches)
        values["replica_microbatches"] = ",".join(map(str, shares))
    if draw(st.integers(0, 3)) == 0:  # without a plan: alike on all ranks of tp
        return {**values, "model": draw(chains(length=sum(sizes))).name}
    return {
        **values,
        "hidden": draw(st.integers(1, 9)),
        "intermediate": tp * draw(st.integers(1, 6)),
        "seq": draw(st.integers(1, 3)),
        "micro_batch_size": draw(st.integers(1, 3)),
    }


@with_workers
@example(values={"dp": 2, "ranks": 2, "tp": 2, "schedule": "zb-v", "microbatches": 4})
@example(values={"dp": 2, "ranks": 2, "tp": 2, "schedule": "zb-v", "microbatches": 5, "replica_microbatches": "2,5"})
@given(values=meshes())
def test_any_mesh_computes_what_one_process_computes(values: dict[str, Any], pool: WorkerPool) -> None:
    """Bit by bit without dp and tp; with dp outputs bit by bit and gradients within the rounding of a reordered sum;
    with tp within the stated roundings, in float64 within 1e-12 of the layer's largest gradient."""
    config = tiny(**values)
    report = ppexec.verify(config, pool=pool)
    assert report.passed, report.first_difference
    assert report.gradients_equal
    assert report.max_gradient_diff <= report.tolerance
    assert report.max_output_diff <= report.output_tolerance
    if config.tp == 1 or "model" in values:
        assert report.outputs_bit_equal
        assert report.max_output_diff == 0
        if config.dp == 1:
            assert report.gradients_bit_equal
    if config.tp == 1 and config.dp == 1:
        assert (report.tolerance, report.output_tolerance) == (0, 0)
    trained = [parameter for layer in load_model(config).layers for parameter in layer.parameters()]
    names = sum(parameter.requires_grad for parameter in trained)
    assert report.compared == config.tp * (config.step_microbatches + config.dp * names)


EIGHT = [(dp, pp, tp) for dp in (1, 2) for pp in (1, 2) for tp in (1, 2)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize(("dp", "pp", "tp"), EIGHT)
@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_both_models_are_equal_on_all_eight_meshes(
    pool: WorkerPool, model: str, schedule: str, dp: int, pp: int, tp: int
) -> None:
    config = tiny(model=model, dp=dp, ranks=pp, tp=tp, schedule=schedule, dtype="float64")
    report = ppexec.verify(config, pool=pool)
    assert report.passed
    assert report.gradients_bit_equal == (dp * tp == 1)
    assert report.tolerance < 1e-11


# The tolerance is small enough to find what it is there to find


def gradients(config: RunConfig, order: list[int]) -> Reference:
    reference = Reference(config, torch.device("cpu"))
    reference.run((tuple(order),))
    return reference


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_lost_microbatch_is_far_outside_the_tolerance(dtype: str) -> None:
    config = tiny(tp=2, dtype=dtype, layers=8, hidden=64, seq=16)
    whole, short = gradients(config, [0, 1, 2, 3]), gradients(config, [0, 1, 2])
    for layer in range(config.layers):
        names = [name for name, _ in whole.layers[layer].named_parameters()]
        apart = max(float((whole.gradient(layer, n) - short.gradient(layer, n)).abs().max()) for n in names)
        assert apart > 100 * whole.rounding(layer, names[0]).max()


def test_a_bias_added_by_every_rank_of_tp_is_outside_the_tolerance() -> None:
    """The classic mistake: fc2's bias once for each rank instead of once."""
    config = tiny(tp=2)
    right, wrong = Reference(config, torch.device("cpu")), Reference(config, torch.device("cpu"))
    with torch.no_grad():
        wrong.layers[3].get_parameter("fc2.bias").mul_(2)
    right.run(((0,),))
    wrong.run(((0,),))
    expected = right.outputs[0][0]
    assert (wrong.outputs[0][0] - expected).abs().max() > 100 * right.output_rounding(0, 0)


def test_the_tolerance_is_stated_in_roundings() -> None:
    """4 blocks have 8 sums, of at most 32 terms; tp parts and the two results are rounded besides."""
    config = tiny(tp=2)
    model = load_model(config)
    assert sharded_roundings(model, config) == pytest.approx(8 * (2 * 32**0.5 + 3))
    assert sharded_roundings(model, replace(config, dtype="float64")) == pytest.approx(8 * (2 * 32**0.5 + 3))
    short = replace(config, dtype="bfloat16")  # kernels add up in float32
    assert sharded_roundings(model, short) == pytest.approx(8 * (2 * 32**0.5 * 2**-16 + 3))
    assert sharded_roundings(model, replace(config, tp=1)) == 0


def test_only_modules_that_are_cut_count() -> None:
    """A GPT block has six of them, of at most 8, and of 8 by 32; its vocabulary of 256 and its norms are whole."""
    config = tiny(model="gpt", tp=2)
    cut = {8: 4, 32: 2}  # side -> modules: q, k, v and o; fc1 and fc2
    expected = 4 * sum(count * (2 * side**0.5 + 3) for side, count in cut.items())
    assert sharded_roundings(load_model(config), config) == pytest.approx(expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_gpt_that_recomputes_is_equal_on_a_mesh(pool: WorkerPool, schedule: str, tied: bool, tp: int) -> None:
    more = {"model": "gpt", "recompute": True, "tied": tied, "dropout": 0.1, "dtype": "float64"}
    assert ppexec.verify(tiny(dp=2, tp=tp, schedule=schedule, **more), pool=pool).passed


def test_a_rounding_counts_as_what_it_does() -> None:
    assert allowed(10, torch.float32, largest=4.0, moved=0.0) == 10 * 4 * 2**-24
    assert allowed(10, torch.float32, largest=4.0, moved=1e-3) == pytest.approx(1e-2)
    assert allowed(10, torch.float64, largest=4.0, moved=0.0) == 4e-12
    assert allowed(0, torch.float64, largest=4.0, moved=0.0) == 0


def test_a_nudge_is_one_rounding_up_or_down() -> None:
    before = torch.tensor([1.0, -2.0, 0.5, 0.0] * 50)
    ratio = nudged(before, 3, "x")[before != 0] / before[before != 0]
    assert set(ratio.tolist()) == {1 + 2**-23, 1 - 2**-23}
    assert torch.equal(nudged(before, 3, "x"), nudged(before, 3, "x"))
    assert not torch.equal(nudged(before, 3, "x"), nudged(before, 4, "x"))


def test_the_reference_is_as_it_was_after_its_controls() -> None:
    """Parameters, gradients and outputs are those of the step itself, not of a nudged one."""
    plain, controlled = Reference(tiny(), torch.device("cpu")), Reference(tiny(tp=2), torch.device("cpu"))
    for reference in (plain, controlled):
        reference.run(((2, 0, 1, 3),))
    for one, other in zip(plain.layers, controlled.layers, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.grad is not None
            assert torch.equal(mine.grad, theirs.grad)
    assert all(torch.equal(plain.outputs[0][b], controlled.outputs[0][b]) for b in range(4))


def test_meshes_of_earlier_worlds_are_forgotten(pool: WorkerPool) -> None:
    """PyTorch found what it kept of an equal mesh of the world before, whose groups had other names."""
    for dp, pp, tp in [(1, 1, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2), (2, 1, 2), (2, 2, 2)]:
        assert ppexec.verify(tiny(dp=dp, ranks=pp, tp=tp, hidden=3), pool=pool).passed


def test_a_loss_that_amplifies_roundings_is_allowed_for(pool: WorkerPool) -> None:
    """With one output that almost hits its target, a rounding of it is many of the gradient's."""
    config = tiny(dp=2, tp=2, microbatches=1, layers=3, partition="1,2", seed=1, hidden=1, intermediate=2, seq=1)
    assert ppexec.verify(config, pool=pool).passed
