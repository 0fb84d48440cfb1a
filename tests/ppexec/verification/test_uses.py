"""Uses: whatever a model does with its modules and outputs, its gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from tests.support import uses
from tests.support.remote import tiny
from tests.support.tied import is_tied_over_stages

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None"),
]

SPLIT = ["zb-h1", "zb-v", "dualpipe-v"]


def using(name: str, **changes: Any) -> RunConfig:
    return tiny(**{"model": f"tests.support.uses:{name}", "layers": 8, **changes})


def check(config: RunConfig, pool: WorkerPool) -> None:
    report = ppexec.verify(config, pool=pool)
    assert report.outputs_equal, report.first_difference
    assert report.gradients_equal, report.first_difference
    if config.dp == config.tp == 1 and not is_tied_over_stages(config):
        assert report.gradients_bit_equal, report.first_difference


@pytest.mark.one_in(3)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("schedule", ["1f1b", *SPLIT])
@pytest.mark.parametrize("name", uses.NAMES)
def test_gradients_are_those_of_one_process(pool: WorkerPool, name: str, schedule: str, recompute: bool) -> None:
    check(using(name, schedule=schedule, recompute=recompute), pool)


@pytest.mark.parametrize("schedule", [name for name in ppsim.schedule_names() if name not in ("1f1b", *SPLIT)])
def test_every_other_schedule_too(pool: WorkerPool, schedule: str) -> None:
    for name in ("listed_twice", "fused", "tied_in_three", "routed"):
        check(using(name, schedule=schedule), pool)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("changes", [{"tp": 2}, {"dp": 2}, {"backend": "local", "device": "threads"}], ids=str)
@pytest.mark.parametrize("name", uses.NAMES)
def test_on_every_mesh(pool: WorkerPool, name: str, changes: dict[str, Any]) -> None:
    check(using(name, schedule="zb-v", dtype="float64", **changes), pool)


@pytest.mark.parametrize("name", ["listed_twice", "on_several_stages", "fused", "routed", "tied_in_three"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_bytes_are_predicted(pool: WorkerPool, name: str, schedule: str) -> None:
    """What an opaque backward keeps for W counts, and a parameter with two places in a stage counts once."""
    config = using(name, schedule=schedule)
    with Session(config, pool=pool) as session:
        counted, stages = session.count_memory(), session.profile(1).stages
        (trace,) = session.measure(1)
    predicted = ppsim.simulate(config.pipeline, stages)
    assert [level for rank in counted for level in rank] == predicted.activation_bytes.tolist()
    assert trace.message_bytes.tolist() == predicted.message_bytes.tolist()


def test_replicas_add_up_a_shared_parameter_once_and_the_prediction_says_so(pool: WorkerPool) -> None:
    config = using("listed_twice", schedule="1f1b", dp=2)
    with Session(config, pool=pool) as session:
        stages = session.profile(1).stages
        (trace,) = session.measure(1)
    width = config.hidden
    own = (width * width + width) * 4
    assert [stage.parameter_bytes for stage in stages] == [2 * own, 2 * own]  # layers 0 and 1 to 3; 5 and 6
    assert trace.reduce_bytes is not None
    assert trace.reduce_bytes.tolist() == [2 * own, 2 * own]


def test_a_training_updates_a_shared_parameter_once(pool: WorkerPool) -> None:
    """On any mesh the losses of a training are those of one rank."""
    for name in ("listed_twice", "on_several_stages", "tied_in_three"):
        losses = [
            ppexec.train(using(name, schedule="zb-v", dtype="float64", ranks=ranks, steps=4), pool=pool).losses
            for ranks in (1, 2)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
