"""Graphs: actions recorded once and replayed give the same in every step, wherever and whatever runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppexec.machine.recorded_operations import OperationRecorder
from tests.support import uses
from tests.support.factories import spelled
from tests.support.remote import tiny
from tests.support.tied import is_tied_over_stages

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None"),
]

WHERE: list[dict[str, Any]] = [
    {"backend": "local", "device": "threads"},
    {"device": "threads"},
    {"device": "cpu", "dp": 2},
    {"recompute": True, "backend": "local"},
]


def check(config: RunConfig, pool: WorkerPool) -> None:
    """The second verify replays what the first has recorded."""
    with Session(config, pool=pool) as session:
        for report in (session.verify(), session.verify()):
            assert report.passed, report.first_difference
            if config.dp == 1 and not is_tied_over_stages(config):
                assert report.gradients_bit_equal, report.first_difference


@pytest.mark.parametrize("schedule", ppsim.schedule_names())
def test_every_schedule(pool: WorkerPool, schedule: str) -> None:
    check(tiny(schedule=schedule, layers=8, graphs=True, backend="local"), pool)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", WHERE, ids=spelled)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_everywhere(pool: WorkerPool, schedule: str, where: dict[str, Any]) -> None:
    check(tiny(schedule=schedule, layers=8, model="gpt", tied=True, graphs=True, **where), pool)


@pytest.mark.parametrize("name", uses.NAMES)
def test_every_kind_of_model(pool: WorkerPool, name: str) -> None:
    check(tiny(model=f"tests.support.uses:{name}", layers=8, schedule="zb-h1", graphs=True), pool)


@pytest.mark.parametrize("model", ["several_tensors", "uneven_rows"])
def test_boundaries_of_several_tensors_and_microbatches_of_different_size(pool: WorkerPool, model: str) -> None:
    check(tiny(model=f"ppexec.experiment.soak_models:{model}", layers=8, schedule="zb-h1", graphs=True), pool)


def test_a_training_is_the_same(pool: WorkerPool) -> None:
    """The loss of a replay once stayed that of the first step: its tensor had been given other memory."""
    plain, replayed = (
        ppexec.train(
            tiny(schedule="zb-v", layers=8, steps=4, clip_norm=0.1, evaluate_every=2, graphs=graphs),
            pool=pool,
        )
        for graphs in (False, True)
    )
    assert replayed.losses == plain.losses
    assert len(set(plain.losses)) == 4


def test_bytes_and_times_are_measured_as_without(pool: WorkerPool) -> None:
    counted = []
    for graphs in (False, True):
        with Session(tiny(schedule="zb-h1", graphs=graphs), pool=pool) as session:
            (trace,) = session.measure(1)
            counted.append((session.count_memory(), trace.message_bytes.tolist()))
            assert trace.makespan_s > 0
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 2}, "graphs do not go with tp=2"),
        ({"accumulate": 2}, "graphs do not go with accumulate=2"),
        ({"model": "gpt", "dropout": 0.1}, "graphs do not go with dropout=0.1"),
        ({"compute": "timed"}, "graphs do not go with compute=timed"),
    ],
    ids=spelled,
)
def test_what_no_recording_can_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ppsim.InputError, match=message):
        tiny(graphs=True, **changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("draws", r"layer \d draws random numbers"),
        ("counted_terms", "reduction='sum'"),
    ],
)
def test_a_model_that_differs_from_step_to_step_is_refused(pool: WorkerPool, model: str, message: str) -> None:
    with pytest.raises(ppsim.InputError, match=message):
        Session(tiny(model=f"ppexec.experiment.soak_models:{model}", layers=8, graphs=True), pool=pool)


def test_a_value_read_from_a_tensor_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match="read from a tensor"):
        OperationRecorder().record(lambda: print(torch.ones(1).item()))
