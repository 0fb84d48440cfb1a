"""Both directions for real: two copies of the model compute and add up what one process computes and adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppsim import InputError, Schedule
from tests.support.causality import check_causality
from tests.support.named import BOTH_WAYS
from tests.support.remote import tiny
from tests.support.settings import with_workers
from tests.support.strategies import schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


def check(config: RunConfig, pool: WorkerPool) -> None:
    """Outputs and gradients to the bit, memory to the byte after every action, and a step in order."""
    with Session(config, pool=pool) as session:
        report = session.verify()
        (trace,) = session.measure(1)
        memory, stages = session.memory(), session.profile(1).stages
    assert report.outputs_bit_equal, report.first_difference
    assert report.gradients_bit_equal, report.first_difference
    assert report.tolerance == 0
    check_causality(trace)
    assert trace.schedule == config.pipeline
    assert len(stages) == config.pipeline.stages
    predicted = ppsim.simulate(config.pipeline, stages)
    assert [level for rank in memory for level in rank.activation_bytes] == predicted.activation_bytes.tolist()
    assert [level for rank in memory for level in rank.gradient_bytes or []] == predicted.gradient_bytes.tolist()
    assert [rank.parameter_bytes for rank in memory] == predicted.parameter_bytes.tolist()
    assert trace.message_bytes.tolist() == predicted.message_bytes.tolist()


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 8), (4, 2)])
def test_they_compute_what_one_process_computes(pool: WorkerPool, name: str, ranks: int, microbatches: int) -> None:
    sizes = [1 + stage % 3 for stage in range(ranks)]
    check(
        tiny(
            schedule=name,
            ranks=ranks,
            microbatches=microbatches,
            layers=sum(sizes),
            partition=",".join(map(str, sizes)),
        ),
        pool,
    )


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "local"},
        {"backend": "local", "device": "threads"},
        {"device": "threads"},
        {"recompute": True},
        {"model": "gpt", "dropout": 0.1},
        {"streams": "pair", "communication": "early"},
        {"streams": "rank", "communication": "early"},
        {"dtype": "float64"},
        {"graphs": True},
    ],
    ids=str,
)
def test_wherever_and_however_they_run(pool: WorkerPool, name: str, changes: dict[str, Any]) -> None:
    check(tiny(schedule=name, ranks=2, microbatches=4, layers=4, **changes), pool)


@with_workers
@given(schedule=schedules(max_ranks=3, max_stages=3, max_microbatches=5, copies=2), local=st.booleans())
def test_so_does_any_order_of_two_copies(schedule: Schedule, local: bool, pool: WorkerPool, tmp_path: Path) -> None:
    size = schedule.model_stages
    if any(schedule.placement[stage] == schedule.placement[stage + size] for stage in range(size)):
        return
    path = tmp_path / "both.csv"
    path.write_text(schedule.to_csv())
    changes: dict[str, Any] = {"backend": "local"} if local else {}
    numbers = {"ranks": schedule.ranks, "microbatches": schedule.microbatches, "layers": size}
    check(tiny(from_csv=path, copies=2, **numbers, **changes), pool)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_an_evaluation_has_the_outputs_of_one_process(pool: WorkerPool, name: str) -> None:
    report = ppexec.verify(tiny(schedule=name, ranks=2, microbatches=4, forward_only=True), pool=pool)
    assert report.outputs_bit_equal
    assert report.compared == 4


@pytest.mark.parametrize("model", ["uneven_rows", "several_tensors"])
def test_microbatches_of_different_size_and_several_tensors_take_their_own_way(pool: WorkerPool, model: str) -> None:
    check_gradients(tiny(model=f"ppexec.experiment.soak_models:{model}", layers=8, ranks=2, schedule="dualpipe"), pool)


def check_gradients(config: RunConfig, pool: WorkerPool) -> None:
    report = ppexec.verify(config, pool=pool)
    assert report.passed, report.first_difference
    assert report.gradients_bit_equal, report.first_difference


def test_a_sum_of_losses_is_divided_by_all_terms_of_both_copies(pool: WorkerPool) -> None:
    for schedule, backend in (("chimera", "gloo"), ("dualpipe", "local")):
        model = "ppexec.experiment.soak_models:counted_terms"
        check_gradients(tiny(model=model, layers=8, ranks=2, schedule=schedule, backend=backend), pool)


def test_the_gradients_are_those_of_both_copies(pool: WorkerPool) -> None:
    """Each copy alone would have half of them: what is compared is the sum."""
    both = tiny(schedule="chimera", ranks=2, microbatches=4, layers=4)
    one = tiny(schedule="1f1b", ranks=2, microbatches=4, layers=4)
    reports = [ppexec.verify(each, pool=pool) for each in (both, one)]
    assert all(report.gradients_bit_equal for report in reports)
    assert reports[0].compared - 4 == 2 * (reports[1].compared - 4)


@pytest.mark.parametrize("where", [{}, {"backend": "local"}, {"device": "threads"}], ids=str)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_tied_weights_are_added_up_over_places_and_copies(pool: WorkerPool, name: str, where: dict[str, Any]) -> None:
    """All terms in another order than one process has them: as equal as tied weights of one copy are."""
    for dtype in ("float32", "float64"):
        config = tiny(schedule=name, ranks=2, model="gpt", tied=True, layers=2, dtype=dtype, **where)
        report = ppexec.verify(config, pool=pool)
        assert report.outputs_bit_equal
        assert report.passed, report.first_difference
        assert 0 < report.tolerance < (1e-12 if dtype == "float64" else 1e-3)


# The sum over two ranks in the trace


def test_the_sum_of_the_copies_is_timed_and_predicted(pool: WorkerPool) -> None:
    config = tiny(schedule="dualpipe", ranks=4, microbatches=8, layers=4)
    with Session(config, pool=pool) as session:
        (trace,) = session.measure(1)
        stages, reduction = session.profile(1).stages, session.probe_reduction()
    assert reduction is not None
    assert reduction.replicas == 1  # of data: the copies come from the schedule
    predicted = ppsim.simulate(config.pipeline, stages, reduction=reduction)
    assert trace.reduce_bytes is not None
    assert predicted.reduce_bytes is not None
    assert trace.reduce_bytes.tolist() == predicted.reduce_bytes.tolist()
    assert trace.reduce_start_s is not None
    for stage in range(config.pipeline.stages):
        own = trace.program.stage == stage
        assert trace.reduce_start_s[stage] >= trace.end_s[own].max()


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_timed_compute_takes_costs_of_one_copy(pool: WorkerPool, name: str) -> None:
    cost = ppsim.StageCost(
        forward_s=1e-3, backward_input_s=1e-3, backward_weight_s=1e-3, output_bytes=64, parameter_bytes=400
    )
    config = tiny(schedule=name, ranks=2, microbatches=4, compute="timed")
    with Session(config, pool=pool, costs=[cost] * 2) as session:
        (trace,) = session.measure(1)
    assert trace.message_bytes.tolist() == [64] * len(trace.program.messages)
    assert trace.reduce_bytes is not None
    assert trace.reduce_bytes.tolist() == [400] * 4


# Refused


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(("field", "value"), [("dp", 2), ("tp", 2)])
def test_other_meshes_are_refused(name: str, field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{field} 2 does not go with {name}, which holds 2 copies of the model"):
        tiny(schedule=name, ranks=2, **{field: value})


def test_sharding_is_refused() -> None:
    with pytest.raises(InputError, match="2 copies of the model and gathers parameters"):
        tiny(schedule="dualpipe", ranks=2, dp=2, shard=1)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_training_is_refused(pool: WorkerPool, name: str, tmp_path: Path) -> None:
    with Session(tiny(schedule=name, ranks=2), pool=pool) as session:
        said = f"a training holds one copy of the model, and {name} has 2: take a schedule in one direction"
        for task in (
            lambda: session.train(1),
            lambda: session.save_checkpoint(tmp_path),
            lambda: session.load_checkpoint(tmp_path),
        ):
            with pytest.raises(InputError, match=said):
                task()


def test_a_rank_with_both_copies_of_a_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "same.csv"
    path.write_text("0F0,2F1,0B0,2B1\n1F0,3F1,1B0,3B1\n")
    with pytest.raises(InputError, match="rank 0 holds both copies of stage 0, whose parameters would be one"):
        tiny(from_csv=path, copies=2, microbatches=0, ranks=0)


def test_three_copies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "three.csv"
    path.write_text("0F0,0B0\n1F1,1B1\n2F2,2B2\n")
    with pytest.raises(InputError, match="three has 3 copies of the model: a run takes at most 2"):
        tiny(from_csv=path, copies=3, microbatches=0, ranks=0, layers=1)


def test_copies_are_of_a_file() -> None:
    with pytest.raises(InputError, match="copies 2 says what a file holds: give from_csv too"):
        tiny(copies=2)
