"""Reduction: gradients added up over replicas, small ones together, and when it happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ppsim
from ppexec import Session, WorkerPool
from ppexec.calibrate.calibration import Calibration
from ppexec.experiment.experiment import predict_and_measure
from ppexec.experiment.text import comparison_rows
from ppexec.machine.clock import now_ns
from ppexec.measure.tasks import measure
from ppexec.stage.gradient_sum import Reduction, probe_reduction
from tests.support.remote import on_every_rank, tiny

FREE = Calibration()  # what is asked here is not how long a schedule takes to run


def added_up() -> dict[str, Any]:
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    tensors = [
        torch.full((3,), rank + 1.0),
        torch.full((2, 2), 10.0 * rank, dtype=torch.float64),
        torch.full((1 << 19,), 2.0 + rank),  # 2 MiB: alone
        (torch.arange(12.0).reshape(3, 4) * (rank + 1)).t(),
        torch.zeros(0),
    ]
    before = now_ns()
    reduction = Reduction(tensors, group)
    begin, end = reduction.finish()
    return {
        "sums": [tensor.clone() for tensor in tensors],
        "in_order": before <= begin <= end <= now_ns(),
        "size_bytes": reduction.size_bytes,
        "of_nothing": Reduction([], group).finish(),
    }


def test_sums_are_there_in_place_whatever_size_dtype_and_layout(pool: WorkerPool) -> None:
    for found in on_every_rank(pool, 3, added_up):
        small, double, large, strided, empty = found["sums"]
        assert torch.equal(small, torch.full((3,), 6.0))
        assert torch.equal(double, torch.full((2, 2), 30.0, dtype=torch.float64))
        assert torch.equal(large, torch.full((1 << 19,), 9.0))
        assert torch.equal(strided, (torch.arange(12.0).reshape(3, 4) * 6).t())
        assert empty.numel() == 0
        assert found["in_order"]
        assert found["size_bytes"] == 3 * 4 + 4 * 8 + (1 << 21) + 12 * 4
        assert found["of_nothing"][0] == found["of_nothing"][1]


def records(pool: WorkerPool, **changes: Any) -> Any:
    config = tiny(**changes)
    with Session(config, pool=pool) as session:
        session.measure(1)
        return config, [records[0] for (records,) in pool.call(config.world_size, measure, steps=1)]


@pytest.mark.parametrize(("schedule", "tp"), [("1f1b", 1), ("interleaved-1f1b", 1), ("zb-v", 2)])
def test_each_stage_is_reduced_from_its_last_backward_on(pool: WorkerPool, schedule: str, tp: int) -> None:
    config, seen = records(pool, schedule=schedule, dp=2, tp=tp)
    program, placement = config.pipeline.program, config.pipeline.placement
    block_bytes = 4 * (2 * 8 * 32 // tp + 32 // tp + 8)
    for process, record in enumerate(seen):
        rank = process // tp % config.ranks
        assert set(record.reduced_ns) == {stage for stage in range(len(placement)) if placement[stage] == rank}
        rows = list(program.rows_of(rank))
        for stage, (begin, end) in record.reduced_ns.items():
            kinds = (ppsim.Kind.B, ppsim.Kind.W)
            last = max(at for at, row in enumerate(rows) if program.stage[row] == stage and program.kind[row] in kinds)
            assert record.end_ns[last] <= begin < end
            assert all(begin <= start for start in record.start_ns[last + 1 :])
            assert record.reduced_bytes[stage] == config.layer_sizes[stage] * block_bytes


@pytest.mark.parametrize("compute", ["real", "timed"])
def test_a_trace_has_every_stages_reduction(pool: WorkerPool, compute: str) -> None:
    cost = ppsim.StageCost(forward_s=0.001, backward_input_s=0.001, backward_weight_s=0.001, output_bytes=64,
                           parameter_bytes=4096)  # fmt: skip
    costs = [cost] * 4 if compute == "timed" else None
    with Session(tiny(dp=2, schedule="interleaved-1f1b", compute=compute), pool=pool, costs=costs) as session:
        (trace,) = session.measure(1)
    assert trace.reduce_start_s is not None
    assert trace.reduce_end_s is not None
    last = [max(trace.end_s[list(trace.program.stage == stage)]) for stage in range(4)]
    assert (trace.reduce_start_s >= last).all()
    assert (trace.reduce_end_s > trace.reduce_start_s).all()
    assert trace.reduce_bytes.tolist() == [4096 if costs else 4 * (2 * 8 * 32 + 32 + 8)] * 4
    assert trace.step_s >= trace.makespan_s


def test_one_replica_reduces_nothing(pool: WorkerPool) -> None:
    _, seen = records(pool)
    assert all(record.reduced_ns == {} and record.reduced_bytes == {} for record in seen)
    with Session(tiny(), pool=pool) as session:
        assert session.measure(1)[0].reduce_end_s is None


def test_timed_compute_reduces_as_many_bytes_as_its_costs_have_parameters(pool: WorkerPool) -> None:
    cost = ppsim.StageCost(forward_s=0.001, backward_input_s=0.001, backward_weight_s=0.001, output_bytes=64,
                           parameter_bytes=4096)  # fmt: skip
    config = tiny(dp=2, compute="timed")
    with Session(config, pool=pool, costs=[cost] * 2):
        for ((record,),) in pool.call(config.world_size, measure, steps=1):
            assert list(record.reduced_bytes.values()) == [4096]


def probed() -> list[dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    several = [torch.zeros(size) for size in (1000, 0, 10, 1 << 19, 7)]
    found = [*probe_reduction(several, group), *probe_reduction([torch.zeros(9)], group), *probe_reduction([], group)]
    assert not any(tensor.any() for tensor in several)
    return [{"size_bytes": sample.size_bytes, "seconds": sample.seconds} for sample in found]


def test_a_probe_times_all_gradients_half_and_a_quarter_of_them(pool: WorkerPool) -> None:
    for samples in on_every_rank(pool, 2, probed):
        sizes = [sample["size_bytes"] for sample in samples]
        assert sizes == [4 * (1000 + 10 + (1 << 19) + 7), 4 * 1010, 4 * 1000, 4 * 9, 4 * 4, 4 * 2]
        assert all(0 < sample["seconds"] < 10 for sample in samples)


@pytest.mark.parametrize(("schedule", "tp"), [("1f1b", 1), ("zb-v", 2)])
def test_an_experiment_predicts_the_reductions_it_measures(pool: WorkerPool, schedule: str, tp: int) -> None:
    """The same stages, bytes and ranks on both clocks; summed up as the step with reductions."""
    outcome = predict_and_measure(
        tiny(dp=2, tp=tp, schedule=schedule, steps=3), pool=pool, verify=False, calibration=FREE
    )
    predicted, measured = outcome.predicted, outcome.median
    assert predicted.reduce_bytes is not None
    assert measured.reduce_bytes is not None
    assert predicted.reduce_bytes.tolist() == measured.reduce_bytes.tolist()
    ring = outcome.reduction
    assert ring is not None
    assert predicted.reduce_start_s is not None
    assert predicted.reduce_end_s is not None
    taken = predicted.reduce_end_s - predicted.reduce_start_s
    assert taken.tolist() == pytest.approx([ring.seconds(size) for size in predicted.reduce_bytes.tolist()])
    assert ring.replicas == 2
    whole = outcome.summary()["step_with_reductions_s"]
    assert whole["predicted"] == predicted.step_s > outcome.summary()["step_time_s"]["predicted"]
    assert whole["measured"] == [trace.step_s for trace in outcome.measured]
    assert [row["quantity"] for row in comparison_rows(outcome)][:2] == ["step time", "step with reductions"]


def test_without_replicas_or_gradients_no_reduction_is_predicted(pool: WorkerPool) -> None:
    for config in (tiny(), tiny(dp=2, forward_only=True)):
        outcome = predict_and_measure(config, pool=pool, verify=False, calibration=FREE)
        assert outcome.predicted.reduce_end_s is None
        assert outcome.summary()["step_with_reductions_s"] is None


def test_an_experiment_of_unequal_replicas_predicts_the_longest(pool: WorkerPool) -> None:
    """Also with microbatches of different size, each replica's own."""
    config = tiny(dp=2, schedule="zb-v", microbatches=0, replica_microbatches="2,5", global_batch_size=10,
                  micro_batch_size=0, steps=2)  # fmt: skip
    outcome = predict_and_measure(config, pool=pool, calibration=FREE)
    assert outcome.verified is not None
    assert outcome.verified.passed
    assert {trace.schedule.microbatches for trace in (outcome.predicted, *outcome.measured)} == {5}
    summary = outcome.summary()
    assert summary["memory"]["equal_at_every_action"]
    assert summary["step_with_reductions_s"]["predicted"] == outcome.predicted.step_s > outcome.predicted.makespan_s
    ready_s = outcome.predicted.conditions.gradients_ready_s
    assert np.shape(ready_s) == (4,)
    assert (np.asarray(ready_s) > 0).all()


def test_a_prediction_knows_when_the_shorter_replica_is_ready(pool: WorkerPool) -> None:
    """Timed compute on one rank each, without dispatch: sums start after F and B of the longest replica's three."""
    cost = ppsim.StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, output_bytes=64,
                           parameter_bytes=4096)  # fmt: skip
    config = tiny(dp=2, ranks=1, layers=1, compute="timed", microbatches=0, replica_microbatches="1,3")
    outcome = predict_and_measure(config, pool=pool, costs=[cost], calibration=FREE)
    (expected,) = {trace.reduce_start_s[0] for trace in ppsim.simulate_replicas(config.pipelines, [cost])}
    assert outcome.predicted.reduce_start_s.tolist() == pytest.approx([expected])
    assert outcome.predicted.conditions.gradients_ready_s == pytest.approx([0.03])
