"""Boundaries: layers that hand on several tensors compute, hold and send what is predicted, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from tests.support.factories import spelled
from tests.support.named import allowed
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

FORMS = ["tuple", "dict", "dataclass"]
THREADS = {"backend": "local", "device": "threads"}
SHARED_MEMORY: dict[str, Any] = {}
GLOO = {"receive_window": 2}


def of_form(form: str, **changes: Any) -> RunConfig:
    return tiny(**{"model": spelled("handing", form=form), "layers": 6, "seq": 3, "micro_batch_size": 2, **changes})


def check_all(config: RunConfig, pool: WorkerPool) -> None:
    """Outputs and gradients have the same bits, messages and levels the same bytes."""
    with Session(config, pool=pool) as session:
        report = session.verify()
        (trace,) = session.measure(1)
        counted, stages = session.count_memory(), session.profile(1).stages
    assert report.passed, report.first_difference
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal or config.dp > 1
    predicted = ppsim.simulate(config.pipeline, stages)
    assert trace.message_bytes.tolist() == predicted.message_bytes.tolist()
    assert [level for rank in counted for level in rank] == predicted.activation_bytes.tolist()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", ppsim.schedule_names())
def test_every_schedule_hands_on_several_tensors(pool: WorkerPool, schedule: str, recompute: bool) -> None:
    form = FORMS[ppsim.schedule_names().index(schedule) % 3]
    ranks, microbatches = allowed(schedule, 3, 6)
    numbers = {"ranks": ranks, "microbatches": microbatches, "layers": 2 * ranks, "recompute": recompute}
    check_all(of_form(form, schedule=schedule, **numbers, **THREADS), pool)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transport", [SHARED_MEMORY, GLOO, {"device": "threads"}], ids=["memory", "gloo", "streams"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_every_transport_carries_them(pool: WorkerPool, schedule: str, transport: dict[str, Any], form: str) -> None:
    check_all(of_form(form, schedule=schedule, layers=8, **transport), pool)


@pytest.mark.parametrize("changes", [{"dp": 2}, {"forward_only": True}, {"dp": 2, "recompute": True}], ids=str)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_replicas_and_evaluations_hand_them_on(pool: WorkerPool, schedule: str, changes: dict[str, Any]) -> None:
    check_all(of_form("dataclass", schedule=schedule, **changes), pool)


def test_ranks_of_tp_hold_them_alike(pool: WorkerPool) -> None:
    assert ppexec.verify(of_form("tuple", tp=2, dtype="float64"), pool=pool).passed


@pytest.mark.parametrize("transport", [SHARED_MEMORY, GLOO, THREADS], ids=["memory", "gloo", "local"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_boundary_of_integers_alone_sends_no_gradient(
    pool: WorkerPool, schedule: str, transport: dict[str, Any]
) -> None:
    """The message that comes back has no bytes, and still says that its sender is done."""
    config = tiny(model=spelled("counting"), layers=4, ranks=4, schedule=schedule, seq=3, **transport)
    check_all(config, pool)
    with Session(config, pool=pool) as session:
        (trace,) = session.measure(1)
    assert 0 in trace.message_bytes


def test_what_was_measured_in_timed_compute_has_both_sizes(pool: WorkerPool) -> None:
    """Messages of timed stages are as long as the costs say, ahead and back."""
    cost = ppsim.StageCost(
        forward_s=1e-3, backward_input_s=1e-3, backward_weight_s=1e-3, output_bytes=100, output_gradient_bytes=0
    )
    config = tiny(compute="timed")
    with Session(config, pool=pool, costs=[cost] * 2) as session:
        (trace,) = session.measure(1)
    assert trace.message_bytes.tolist() == ppsim.simulate(config.pipeline, [cost] * 2).message_bytes.tolist()
    assert sorted({*trace.message_bytes.tolist()}) == [0, 100]
