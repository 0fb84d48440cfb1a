"""Verify and reference: what the pipeline computes is, bit by bit, what one process computes; and a lie is found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import ppexec
import ppsim
from ppexec import Model, Session, WorkerPool
from ppexec.models.load import load_model
from ppexec.models.seeds import microbatch_order
from ppexec.verification.comparison import Comparison
from ppexec.verification.reference import accumulation_orders
from ppexec.verification.verify import VerifyReport
from tests.support.chains import Case, cases
from tests.support.factories import newest_results, spelled
from tests.support.remote import on_every_rank, tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


@with_workers
@given(case=cases())
def test_every_run_is_bit_equal_to_one_process(case: Case, pool: WorkerPool, tmp_path: Path) -> None:
    report = ppexec.verify(case.config(tmp_path), pool=pool)
    assert report.first_difference is None
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal
    assert report.gradients_equal
    assert report.passed
    assert (report.max_output_diff, report.max_gradient_diff, report.tolerance) == (0, 0, 0)


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1", "zb-v"])
def test_layers_that_work_in_place_are_bit_equal_wherever_the_cut_is(schedule: str, pool: WorkerPool) -> None:
    """Cause of a failure: a stage that began with such a layer ended in autograd's rule on leaves."""
    linear, in_place = ["linear", 4, 4, "float32"], ["relu_", "float32"]
    model = spelled("chain", shape=[3, 4], integers=False, layers=[linear, in_place] * 4)
    for partition in {"zb-v": ["1,2,2,3", "2,2,2,2"]}.get(schedule, ["3,5", "4,4"]):
        config = tiny(schedule=schedule, model=model, layers=8, partition=partition)
        report = ppexec.verify(config, pool=pool)
        assert report.outputs_bit_equal
        assert report.gradients_bit_equal


@pytest.mark.parametrize("order", ["0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", "1F0,1B0,1F1,1B1\n0F0,0F1,0B0,0B1\n"])
def test_ranks_of_one_process_are_bit_equal_wherever_the_first_stage_is(
    order: str, pool: WorkerPool, tmp_path: Path
) -> None:
    """Cause of a failure: the shapes were asked of a rank that has no process of its own."""
    path = tmp_path / "order.csv"
    path.write_text(order)
    config = tiny(from_csv=path, microbatches=0, layers=2, backend="local", device="threads")
    assert ppexec.verify(config, pool=pool).gradients_bit_equal


# The same, with a baseline that shares no code with ppexec


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


Tensors = dict[tuple[int, str], torch.Tensor | None]


def plain_step(model: Model, samples: Sequence[int]) -> tuple[Tensors, dict[int, torch.Tensor]]:
    """Gradients of the mean of the samples' losses, added up in their order, and the outputs: plain PyTorch."""
    network = nn.Sequential(*model.layers)
    network.zero_grad(set_to_none=True)
    outputs = {}
    for index in samples:
        inputs, target = model.sample(index)
        outputs[index] = network(inputs)
        (model.loss(outputs[index], target) / len(samples)).backward()
    named = [(layer, *item) for layer, module in enumerate(model.layers) for item in module.named_parameters()]
    return {(layer, name): parameter.grad for layer, name, parameter in named}, outputs


def backward_order(schedule: ppsim.Schedule, stage: int) -> list[int]:
    """The microbatches in the order in which the stage's weights get their gradients; sums of floats depend on it."""
    order = schedule.orders[schedule.placement[stage]]
    return order.microbatch[(order.stage == stage) & np.isin(order.kind, [ppsim.Kind.B, ppsim.Kind.W])].tolist()


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Equal as bits; a parameter that takes no part has no gradient in either."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()


@with_workers
@given(case=cases().filter(lambda case: "model" in case.values))
def test_gradients_in_the_workers_are_those_of_plain_pytorch(case: Case, pool: WorkerPool, tmp_path: Path) -> None:
    config = case.config(tmp_path)
    schedule = config.pipeline
    with Session(config, pool=pool) as session:
        session.measure(1)
    by_rank = on_every_rank(pool, config.ranks, newest_results)
    holder = [by_rank[schedule.placement[stage]] for stage, size in enumerate(config.layer_sizes) for _ in range(size)]
    stages = [stage for stage, size in enumerate(config.layer_sizes) for _ in range(size)]

    model = load_model(config)
    with torch.no_grad():
        for layer, module in enumerate(model.layers):
            for name, parameter in module.named_parameters():
                parameter.copy_(holder[layer]["parameters"][layer, name])

    samples = microbatch_order(config.seed, step=0, microbatches=config.microbatches).tolist()
    with one_thread():
        baselines = [plain_step(model, [samples[b] for b in backward_order(schedule, stage)]) for stage in set(stages)]
    for layer, module in enumerate(model.layers):
        gradients, _ = baselines[stages[layer]]
        for name, _ in module.named_parameters():
            assert same(holder[layer]["gradients"][layer, name], gradients[layer, name]), (layer, name)
    outputs, expected = by_rank[schedule.placement[-1]]["outputs"], baselines[-1][1]
    assert outputs.keys() == expected.keys()
    assert all(same(outputs[index], expected[index]) for index in expected)


def test_a_split_backward_of_attention_is_bit_equal(pool: WorkerPool, tmp_path: Path) -> None:
    """Cut off, its query, key and value were three copies of one tensor, for which attention computes otherwise."""
    layers = [["linear", 2, 2, "float32"], ["tanh", "float32"], ["attention", 2, "float32"]]
    model = spelled("chain", shape=[1, 2, 2], integers=False, layers=layers)
    case = Case(values={"layers": 3, "ranks": 1, "microbatches": 1, "model": model}, csv="0F0,1F0,2F0,2I0,2W0,1B0,0B0")
    assert ppexec.verify(case.config(tmp_path), pool=pool).first_difference is None


@pytest.mark.parametrize("partition", ["3,1", "1,3"])
def test_a_view_with_gaps_is_bit_equal_within_a_stage_and_across(pool: WorkerPool, partition: str) -> None:
    """A message has no gaps, and kernels may add up otherwise where their input has: so the reference has none."""
    layers = [["linear", 5, 5, "float32"], ["tanh", "float32"], ["strided", "float32"], ["linear", 5, 5, "float32"]]
    model = spelled("chain", shape=[2, 2, 5], integers=False, layers=layers)
    report = ppexec.verify(tiny(model=model, partition=partition), pool=pool)
    assert report.first_difference is None


# A wrong gradient or output is found, and the first tensor that differs is named.


def test_a_wrong_gradient_is_found_and_named_though_every_output_is_right(pool: WorkerPool) -> None:
    """Layer 3 lives on rank 1, where the gradient that it sends down is wrong."""
    config = tiny(model=spelled("with_one", kind="WrongBackward", at=3))
    report = ppexec.verify(config, pool=pool)
    assert report.outputs_bit_equal
    assert not report.gradients_bit_equal
    assert not report.gradients_equal
    assert not report.passed
    assert report.max_gradient_diff > 0
    assert report.first_difference is not None
    assert report.first_difference.startswith("gradient of layer 0 weight differs by up to ")


def test_a_right_gradient_in_the_same_place_passes(pool: WorkerPool) -> None:
    """On rank 0 that layer does nothing wrong: the sabotage above is what was found."""
    report = ppexec.verify(tiny(model=spelled("with_one", kind="WrongBackward", at=1)), pool=pool)
    assert report.passed
    assert report.compared == 4 + 4 * 2  # outputs by microbatch, then weights and biases


def test_an_output_that_depends_on_the_process_is_found_and_named(pool: WorkerPool) -> None:
    report = ppexec.verify(tiny(model=spelled("with_one", kind="WrongForward", at=2)), pool=pool)
    assert not report.outputs_bit_equal
    assert not report.passed
    assert report.max_output_diff > 0
    assert report.first_difference is not None
    assert report.first_difference.startswith("output of microbatch 0 differs by up to ")


def test_a_nan_that_one_process_does_not_have_is_a_difference(pool: WorkerPool) -> None:
    report = ppexec.verify(tiny(model=spelled("with_one", kind="NotANumber", at=2)), pool=pool)
    assert not report.outputs_bit_equal
    assert not report.gradients_equal
    assert report.max_output_diff == math.inf


def test_an_evaluation_compares_outputs_alone(pool: WorkerPool) -> None:
    report = ppexec.verify(tiny(forward_only=True, microbatches=5), pool=pool)
    assert report.passed
    assert report.compared == 5


def test_a_report_is_json_and_has_the_promised_keys(pool: WorkerPool) -> None:
    document = json.loads(json.dumps(ppexec.verify(tiny(), pool=pool).to_dict(), allow_nan=False))
    assert document["outputs_bit_equal"] is True
    assert document["gradients_bit_equal"] is True
    assert document["gradients_equal"] is True
    assert (document["max_output_diff"], document["max_gradient_diff"], document["tolerance"]) == (0, 0, 0)
    assert document["config"]["schedule"] == "afab"


# VerifyReport and Comparison, without workers


def comparison(what: str, *, bit_equal: bool = True, difference: float = 0.0, largest: float = 1.0) -> Comparison:
    """A tensor that may not differ at all."""
    return Comparison(
        what=what,
        layer=2,
        name="weight",
        bit_equal=bit_equal,
        within=bit_equal or difference == 0,
        max_abs_diff=difference,
        tolerance=0.0,
        largest=largest,
    )


def test_a_report_of_missing_tensors_is_refused() -> None:
    config = tiny(microbatches=4)
    with pytest.raises(RuntimeError, match="compared 3 outputs of 4"):
        VerifyReport.of(config, [*[comparison("output")] * 3, comparison("gradient")])


def test_a_model_without_parameters_is_compared_by_its_outputs(pool: WorkerPool) -> None:
    model = spelled("chain", shape=[2, 2, 5], integers=False, layers=[["tanh", "float32"]] * 4)
    report = ppexec.verify(tiny(model=model), pool=pool)
    assert report.passed
    assert report.compared == tiny().microbatches


def test_the_first_difference_says_how_many_roundings_it_is() -> None:
    wrong = comparison("gradient", bit_equal=False, difference=2.0**-21, largest=2.0)
    report = VerifyReport.of(tiny(), [*[comparison("output")] * 4, wrong])
    assert report.first_difference == (
        "gradient of layer 2 weight differs by up to 4.768e-07, 2.0 fp32 roundings of its largest element"
    )


def test_bits_count_not_values() -> None:
    """0.0 and -0.0 are equal and not the same; a NaN is the same as itself."""
    equal_bits = VerifyReport.of(tiny(), [*[comparison("output")] * 4, comparison("gradient", difference=math.nan)])
    assert equal_bits.passed
    assert equal_bits.max_gradient_diff == 0
    signs = VerifyReport.of(tiny(), [*[comparison("output")] * 4, comparison("gradient", bit_equal=False)])
    assert not signs.gradients_bit_equal
    assert signs.gradients_equal


@given(case=cases())
def test_gradients_add_up_in_the_order_of_each_stages_backwards(case: Case) -> None:
    schedule = ppsim.Schedule.from_csv(case.csv) if case.csv else tiny(**case.values).pipeline
    size = schedule.model_stages
    expected = [
        tuple(tuple(backward_order(schedule, stage)) for stage in range(first, schedule.stages, size))
        for first in range(size)
    ]
    assert accumulation_orders(schedule.program) == expected
