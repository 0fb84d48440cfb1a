"""Predicted and measured, of schedules that recompute, offload, or shard their parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ppexec
import ppsim
from ppexec import RunConfig
from ppexec.experiment.experiment import Outcome
from ppexec.experiment.text import comparison_rows, memory_rows, memory_verdict
from ppexec.workers.pool import WorkerPool
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


def moved(tmp_path: Path, name: str, *, recompute: float = 0.0, **changes: object) -> RunConfig:
    """A run of a built-in schedule with O and L, and some R."""
    built = ppsim.build_schedule(name, ranks=2, microbatches=4).with_recompute(share=recompute).with_offload()
    path = tmp_path / "moved.csv"
    path.write_text(built.to_csv(offload=True))
    return tiny(from_csv=path, **{"layers": 8, "hidden": 16, "seq": 16, "steps": 2, "warmup": 1, **changes})


def check(outcome: Outcome) -> None:
    """Bytes are equal after every action, gradients are those of one process, and parts are those of the bubble."""
    assert outcome.summary()["memory"]["first_difference"] is None, memory_verdict(outcome)
    assert outcome.verified is None or outcome.verified.passed
    assert comparison_rows(outcome)
    assert memory_rows(outcome)
    for trace in (outcome.predicted, outcome.median):
        found = ppsim.attribute(trace)
        assert sum(found.parts_s.values()) == pytest.approx(trace.bubble_s)
    assert ppsim.compare(outcome.predicted, outcome.median).explain()


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("recompute", [0.0, 0.5])
def test_offloaded_activations(pool: WorkerPool, tmp_path: Path, schedule: str, recompute: float) -> None:
    """On a CPU a rank copies between its actions, on both clocks."""
    config = moved(tmp_path, schedule, recompute=recompute)
    outcome = ppexec.predict_and_measure(config, pool=pool)
    check(outcome)
    assert outcome.profile is not None
    assert outcome.verified is not None
    assert outcome.verified.gradients_bit_equal
    predicted, measured = outcome.predicted, outcome.median
    link = outcome.host_link
    assert predicted.conditions.host_link == link
    assert predicted.conditions.blocking
    assert measured.conditions.blocking
    assert predicted.copy_bytes.tolist() == measured.copy_bytes.tolist()
    lengths_s = predicted.copy_end_s - predicted.copy_start_s
    assert lengths_s == pytest.approx(link.copy_s(predicted.copy_bytes))
    assert outcome.summary()["host_link"] == link.to_dict()
    for trace in (predicted, measured):
        assert ppsim.attribute(trace).copies_s.any()  # of some they hide under waiting for messages
        for rank in range(trace.ranks):  # no action and no copy of a rank runs at the same time as another
            rows, copies = list(trace.program.rows_of(rank)), trace.program.offload.rank == rank
            begin_s = np.concatenate([trace.start_s[rows], trace.copy_start_s[copies]])
            end_s = np.concatenate([trace.end_s[rows], trace.copy_end_s[copies]])
            in_time = np.argsort(begin_s, kind="stable")
            assert (begin_s[in_time][1:] >= end_s[in_time][:-1] - 1e-9).all()
    if recompute:
        assert all(cost.recompute_s is not None and cost.recompute_s > 0 for cost in outcome.stages)
        assert len(set(predicted.copy_bytes.tolist())) > 1  # an F that is computed once more leaves less


def test_a_profile_without_copies_has_no_link(pool: WorkerPool) -> None:
    with ppexec.Session(tiny(), pool=pool) as session:
        assert session.profile(1).host_link is None
        assert session.probe_collectives() is None
        assert not session.measure(1)[0].conditions.blocking


@pytest.mark.parametrize("backend", ["gloo", "local"])
def test_copies_on_streams_of_their_own(pool: WorkerPool, tmp_path: Path, backend: str) -> None:
    """An asynchronous device, here threads, copies beside its computations; bytes are those of where copies stand."""
    config = moved(tmp_path, "1f1b", recompute=0.5, device="threads", backend=backend)
    outcome = ppexec.predict_and_measure(config, pool=pool)
    check(outcome)
    assert not outcome.predicted.conditions.blocking
    assert outcome.predicted.copy_bytes.tolist() == outcome.median.copy_bytes.tolist()


def test_timed_compute_moves_nothing_and_counts_it(pool: WorkerPool, tmp_path: Path) -> None:
    cost = ppsim.StageCost(
        forward_s=2e-3, backward_input_s=2e-3, backward_weight_s=2e-3, activation_bytes=800, output_bytes=100
    )
    config = moved(tmp_path, "1f1b", compute="timed")
    outcome = ppexec.predict_and_measure(config, pool=pool, costs=[cost] * 2)
    check(outcome)
    assert outcome.host_link is None
    assert outcome.predicted.host_bytes.max() == 800


def test_stated_costs_have_no_parameters_to_shard(pool: WorkerPool) -> None:
    """With costs ranks wait, and add up plain gradients of the stated bytes, also where shard is asked for."""
    cost = ppsim.StageCost(forward_s=2e-3, backward_input_s=2e-3, backward_weight_s=2e-3, parameter_bytes=4000)
    outcome = ppexec.predict_and_measure(tiny(dp=2, shard=1), pool=pool, costs=[cost] * 2)
    check(outcome)
    assert outcome.collectives is None
    assert outcome.reduction is not None


def test_offloaded_activations_of_sharded_stages(pool: WorkerPool, tmp_path: Path) -> None:
    """What autograd saved of whole parameters stays, and is gathered anew before the backward that needs it."""
    outcome = ppexec.predict_and_measure(moved(tmp_path, "zb-v", recompute=0.5, dp=2, shard=1), pool=pool)
    check(outcome)
    assert outcome.verified is not None
    assert outcome.verified.compared > 4
    for trace in (outcome.predicted, outcome.median):
        assert len(trace.unshard_start_s) > trace.schedule.stages
        assert len(trace.copy_start_s) > trace.schedule.stages


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        ("interleaved-1f1b", {"shard": 1}),
        ("zb-v", {"shard": 2}),
        ("1f1b", {"shard": 1, "ranks": 1, "dp": 3, "layers": 2, "hidden": 7, "intermediate": 10}),
        ("1f1b", {"shard": 1, "forward_only": True}),
    ],
)
def test_sharded_parameters(pool: WorkerPool, schedule: str, changes: dict[str, object]) -> None:
    """Of 7 or 10 rows three replicas hold 3 and 4 at most, and gather 9 and 12."""
    values = {"dp": 2, "layers": 8, "hidden": 16, "seq": 4, "steps": 2, "warmup": 1}
    config = tiny(schedule=schedule, **(values | changes))
    outcome = ppexec.predict_and_measure(config, pool=pool)
    check(outcome)
    collectives, predicted, measured = outcome.collectives, outcome.predicted, outcome.median
    assert outcome.reduction is None
    assert outcome.summary()["collectives"] == collectives.to_dict()
    stages = config.pipeline.stages
    assert len(collectives.unshard_s) == len(collectives.reduce_s) == stages
    assert all(seconds > 0 for seconds in collectives.unshard_s)
    assert predicted.conditions.collectives == collectives
    assert predicted.unshard_bytes.tolist() == measured.unshard_bytes.tolist()
    taken_s = predicted.unshard_end_s - predicted.unshard_start_s
    assert set(np.round(taken_s, 12)) <= set(np.round(collectives.unshard_s, 12))
    if config.forward_only:
        assert predicted.reduce_end_s is None
        return
    assert predicted.reduce_bytes.tolist() == measured.reduce_bytes.tolist()
    assert predicted.reduce_end_s - predicted.reduce_start_s == pytest.approx(collectives.reduce_s)
    if config.dp == 3:  # two layers of 10 x 7 + 10 and 7 x 10 + 7, four bytes each; the first replica holds the most
        assert collectives.parameter_share_bytes == (2 * 4 * (4 * 7 + 4 + 3 * 10 + 3),)
        assert collectives.gradient_share_bytes == collectives.parameter_share_bytes
        assert collectives.whole_bytes == (2 * 4 * (12 * 7 + 12 + 9 * 10 + 9),)
