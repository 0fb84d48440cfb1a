"""Microbatches of different size, and losses that are means or sums: all equal to one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ppexec
import ppsim
from ppexec import Model, RunConfig, Session, WorkerError, WorkerPool
from ppexec.measure.assemble import with_memory
from ppexec.models.load import load_model
from ppexec.stage.tied import build_layers
from ppsim import InputError
from ppsim.explain.memory_difference import first_difference
from ppsim.simulation.memory_columns import with_columns
from tests.support.factories import spelled
from tests.support.remote import tiny

HERE = "tests.ppexec.verification.test_sizes"
ROWS, LENGTHS, TERMS = (3, 3, 2, 1), (4, 2, 6, 5), (1, 2, 3, 10)
SCHEDULES = ["1f1b", "zb-h1", "zb-v", "dualpipe-v", "interleaved-1f1b"]
HOW: dict[str, dict[str, Any]] = {
    "shared memory": {},
    "gloo": {"receive_window": 16},
    "threads": {"device": "threads"},
    "one process": {"backend": "local"},
    "recomputing": {"recompute": True},
}


def _tokens(index: int, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens and of labels, of which all but TERMS are -100."""
    stream = torch.Generator().manual_seed(1000 * config.seed + index)
    shape = (4, 5)
    labels = torch.full(shape, -100)
    labels.view(-1)[: TERMS[index % 4]] = torch.randint(7, (TERMS[index % 4],), generator=stream)
    return torch.randint(7, shape, generator=stream), labels


class Head(nn.Linear):
    """Gives logits with the classes second, as cross entropy takes them."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return super().forward(value).movedim(-1, 1)


def _language(config: RunConfig, loss: Any, reduction: Any) -> Model:
    width = config.hidden
    layers: list[nn.Module] = [nn.Embedding(7, width, dtype=config.torch_dtype)]
    layers += [
        nn.Sequential(nn.Linear(width, width, dtype=config.torch_dtype), nn.Tanh()) for _ in range(config.layers - 2)
    ]
    layers.append(Head(width, 7, dtype=config.torch_dtype))
    return Model(layers=layers, sample=lambda index: _tokens(index, config), loss=loss, reduction=reduction)


def _sum(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, labels, ignore_index=-100, reduction="sum")


def valid(labels: torch.Tensor) -> int:
    """The labels that count."""
    return int((labels != -100).sum())


def by_targets(config: RunConfig) -> Model:
    """The number of valid tokens is known from the targets."""
    return _language(config, _sum, valid)


def by_loss(config: RunConfig) -> Model:
    """The number of valid tokens comes with the loss."""
    return _language(config, lambda output, labels: (_sum(output, labels), (labels != -100).sum()), "sum")


def uneven(config: RunConfig) -> Model:
    """Microbatch i has ROWS[i mod 4] rows."""
    width = config.hidden

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(1000 * config.seed + index)
        both = torch.randn(2, ROWS[index % 4], width, generator=stream, dtype=config.torch_dtype)
        return both[0], both[1]

    layers = [nn.Sequential(nn.Linear(width, width, dtype=config.torch_dtype), nn.Tanh()) for _ in range(config.layers)]
    return Model(layers=layers, sample=sample, loss=nn.functional.mse_loss)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["uneven", "by_targets", "by_loss"])
def test_every_size_and_reduction_is_equal_to_one_process(
    pool: WorkerPool, model: str, schedule: str, how: str
) -> None:
    config = tiny(model=f"{HERE}:{model}", schedule=schedule, layers=8, microbatches=4, **HOW[how])
    report = ppexec.verify(config, pool=pool)
    assert report.gradients_bit_equal
    assert report.outputs_bit_equal


@pytest.mark.parametrize("model", ["uneven", "by_targets", "by_loss"])
def test_replicas_divide_by_what_all_of_them_have(pool: WorkerPool, model: str) -> None:
    config = tiny(model=f"{HERE}:{model}", schedule="zb-h1", dp=2, microbatches=3, dtype="float64")
    report = ppexec.verify(config, pool=pool)
    assert report.passed
    assert report.max_gradient_diff < 1e-15


@pytest.mark.parametrize("kind", ["rows", "lengths", "both"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_boundaries_of_several_tensors_may_differ_too(pool: WorkerPool, schedule: str, kind: str) -> None:
    sizes = {"rows": {"rows": list(ROWS)}, "lengths": {"lengths": list(LENGTHS)}}
    given = {"form": "dict", **(sizes["rows"] | sizes["lengths"] if kind == "both" else sizes[kind])}
    model = spelled("handing", **given)
    config = tiny(model=model, schedule=schedule, layers=8)
    assert ppexec.verify(config, pool=pool).gradients_bit_equal


def whole_batch_gradients(config: RunConfig, model: Model, loss: Any) -> dict[str, torch.Tensor]:
    """The gradients of one forward and backward over all microbatches of step 0 together."""
    pairs = [model.sample(index) for index in range(config.microbatches)]
    inputs, targets = (torch.cat([pair[at] for pair in pairs]) for at in (0, 1))
    layers = build_layers(model, range(config.layers), seed=config.seed, device=torch.device("cpu"))
    chain = nn.Sequential(*layers)
    loss(chain(inputs), targets).backward()
    return {name: parameter.grad for name, parameter in chain.named_parameters() if parameter.grad is not None}


def gradients_of(worker: Any) -> dict[str, list[float]]:
    """A task: the gradients that a step of this worker leaves, by layer and name."""
    batch = worker.load(0)
    worker.clear()
    worker.step(batch)
    return {
        f"{stage.first_layer + at}.{name}": parameter.grad.flatten().tolist()
        for stage in worker.real_stages
        for at, layer in enumerate(stage.layers)
        for name, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (uneven, nn.functional.mse_loss),
        (by_targets, lambda output, labels: nn.functional.cross_entropy(output, labels, ignore_index=-100)),
        (by_loss, lambda output, labels: nn.functional.cross_entropy(output, labels, ignore_index=-100)),
    ],
)
def test_a_step_is_the_gradient_of_the_whole_batch(pool: WorkerPool, model: Any, loss: Any) -> None:
    """The mean of microbatch means would be wrong: it counts a token of a small microbatch more than another one."""
    config = tiny(model=f"{HERE}:{model.__name__}", microbatches=4, layers=4, dtype="float64")
    torch.manual_seed(0)
    with Session(config, pool=pool) as session:
        found: dict[str, list[float]] = {}
        for of_process in session._workers.call(gradients_of):
            found.update(of_process)
    expected = whole_batch_gradients(config, load_model(config), loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(
            torch.tensor(found[name], dtype=torch.float64), gradient.flatten(), rtol=1e-12, atol=1e-15
        ), name


def test_steps_of_other_sizes_follow_one_another(pool: WorkerPool) -> None:
    """A larger message than in the first step needs more room; the trace has the bytes of its own step."""
    config = tiny(model=f"{HERE}:growing", microbatches=2, layers=4, schedule="1f1b")
    with Session(config, pool=pool) as session:
        traces = session.measure(4)
    assert [sorted(trace.message_bytes.tolist()) for trace in traces] == [
        sorted(2 * [4 * 8 * (1 + index) for index in (2 * step, 2 * step + 1)]) for step in range(4)
    ]


@pytest.mark.parametrize("how", ["shared memory", "gloo", "one process", "recomputing"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "dualpipe-v"])
def test_bytes_are_predicted_for_each_microbatch(pool: WorkerPool, schedule: str, how: str) -> None:
    config = tiny(model=f"{HERE}:uneven", schedule=schedule, layers=8, microbatches=4, **HOW[how])
    with Session(config, pool=pool) as session:
        costs = session.stage_costs(session.profile(1), 0)
        predicted = with_columns(ppsim.simulate(config.pipeline, costs), receive_window=session.receive_window)
        measured = with_memory(session.measure(1)[0], session.memory())
    assert {cost.output_bytes for of_stage in costs[:-1] for cost in of_stage} == {rows * 8 * 4 for rows in ROWS}
    assert predicted.message_bytes.tolist() == measured.message_bytes.tolist()
    assert first_difference(predicted, measured) is None
    assert len(set(predicted.activation_bytes.tolist())) > 4


def growing(config: RunConfig) -> Model:
    """Microbatch i has i + 1 rows."""
    return Model(
        layers=[nn.Linear(config.hidden, config.hidden) for _ in range(config.layers)],
        sample=lambda index: (torch.ones(index + 1, config.hidden), torch.zeros(index + 1, config.hidden)),
        loss=nn.functional.mse_loss,
    )


class Shrinks(nn.Linear):
    """Gives one row less than it gave on the meta device, from the third forward on."""

    forwards = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.forwards += not value.is_meta
        output = super().forward(value)
        return output[:1] if self.forwards > 2 else output


def shrinking(config: RunConfig) -> Model:
    """A layer whose output's shape depends on more than its input's."""
    width = config.hidden
    return Model(
        layers=[Shrinks(width, width), *[nn.Linear(width, width) for _ in range(config.layers - 1)]],
        sample=lambda index: (torch.ones(4, width), torch.zeros(4, width)),
        loss=nn.functional.mse_loss,
    )


@pytest.mark.parametrize("how", ["shared memory", "gloo", "threads", "one process"])
def test_a_message_of_another_shape_is_never_broadcast(how: str) -> None:
    """One row was silently broadcast to four and computed with."""
    config = tiny(model=f"{HERE}:shrinking", schedule="1f1b", **HOW[how])
    said = r"rank 0, action 0F\d gives a float32 tensor of shape \[1, 8\], but a float32 tensor of shape \[4, 8\] was"
    with WorkerPool() as own, Session(config, pool=own) as session, pytest.raises(WorkerError, match=said):
        session.measure(2)


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        ("nothing", "the step has no sample or no term of a loss"),
        ("negative", "reduction gives -1.0 terms for microbatch 0: give a number of 0 or more"),
        ("single", r"the loss is Tensor: with reduction='sum' give \(sum, number of terms\)"),
    ],
)
def test_a_number_of_terms_that_cannot_be_is_refused(pool: WorkerPool, reduction: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ppexec.verify(tiny(model=f"{HERE}:{reduction}"), pool=pool)


def nothing(config: RunConfig) -> Model:
    """No label counts."""
    return _language(config, _sum, lambda labels: 0)


def negative(config: RunConfig) -> Model:
    """A number below 0."""
    return _language(config, _sum, lambda labels: -1)


def single(config: RunConfig) -> Model:
    """The number is missing."""
    return _language(config, _sum, "sum")
