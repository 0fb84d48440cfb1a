"""Data-parallel replicas: the same step as one process, up to the rounding of another order of adding up.

They may have different numbers of microbatches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ppsim
from ppexec import RunConfig, Session, WorkerPool, verify
from ppexec.measure.assemble import with_memory
from ppexec.models.batch import load_batch
from ppexec.verification.reference import Reference
from ppexec.workers.progress import Board
from ppsim.explain.memory_difference import first_difference
from ppsim.simulation.memory_columns import with_columns
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

TINY = {"layers": 4, "hidden": 8, "seq": 3, "threads": 1}


@pytest.mark.parametrize(
    ("schedule", "dp", "ranks", "microbatches"),
    [("afab", 2, 1, 3), ("1f1b", 2, 2, 3), ("zb-v", 2, 2, 4), ("zb-h1", 3, 1, 2)],
)
def test_gradients_are_within_the_rounding_of_their_sum(
    schedule: str, dp: int, ranks: int, microbatches: int, pool: WorkerPool
) -> None:
    config = RunConfig(schedule=schedule, dp=dp, ranks=ranks, microbatches=microbatches, **TINY)
    report = verify(config, pool=pool)
    assert report.outputs_bit_equal
    assert report.gradients_equal
    assert report.max_gradient_diff <= report.tolerance < 1e-6
    # every replica's outputs, and every replica's copy of every gradient
    assert report.compared == dp * (microbatches + 4 * TINY["layers"])


def test_one_replica_needs_no_tolerance(pool: WorkerPool) -> None:
    assert verify(RunConfig(ranks=2, microbatches=3, **TINY), pool=pool).tolerance == 0


def test_replicas_read_the_global_batch_between_them() -> None:
    config = RunConfig(dp=3, ranks=1, microbatches=2, **TINY)
    read: list[int] = []

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        read.append(index)
        return torch.zeros(1), torch.zeros(1)

    for dp_rank in range(3):
        load_batch(sample, seed=config.seed, step=1, microbatches=[2] * 3, dp_rank=dp_rank, has_first=True,
                   has_last=False, device=torch.device("cpu"))  # fmt: skip
    assert sorted(read) == list(range(6, 12))


def test_the_bound_of_rounding_is_exceeded_by_a_lost_microbatch() -> None:
    """The tolerance is small enough to find what it is there to find."""
    config = RunConfig(dp=2, ranks=1, microbatches=2, **TINY)
    reference = Reference(config, torch.device("cpu"))
    reference.run(((0, 1),))
    whole = reference.gradient(0, "fc1.weight").clone()
    allowed = reference.rounding(0, "fc1.weight")
    assert (allowed > 0).any()
    reference.run(((0,),))
    assert ((whole - reference.gradient(0, "fc1.weight")).abs().double() > allowed).any()


def test_the_first_replica_is_shown(pool: WorkerPool) -> None:
    config = RunConfig(dp=2, ranks=2, microbatches=3, **TINY)
    with Session(config, pool=pool) as session:
        (trace,) = session.measure(1)
        assert trace.ranks == len(session.count_memory()) == 2


# Replicas with different numbers of microbatches


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half", "dualpipe-v"])
def test_a_step_of_unequal_replicas_is_that_of_one_process(schedule: str, pool: WorkerPool) -> None:
    report = verify(tiny(schedule=schedule, dp=2, microbatches=0, replica_microbatches="2,5"), pool=pool)
    assert report.outputs_bit_equal
    assert report.gradients_equal
    assert report.max_gradient_diff <= report.tolerance < 1e-6
    assert report.compared == 7 + 2 * 4 * 4


GPT = {"model": "gpt", "tied": True, "dropout": 0.2, "recompute": True, "dtype": "float64"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tp": 2},
        {"dp": 3, "ranks": 1, "replica_microbatches": "1,3,2"},
        GPT,
        {**GPT, "tp": 2, "schedule": "zb-h1"},
        {"device": "threads", "schedule": "zb-v"},
        {"device": "threads", "streams": "rank", "communication": "early"},
        {"receive_window": 9},
        {"graphs": True},
        {"forward_only": True},
        {"shard": 1, "schedule": "zb-h1"},
        {"shard": 2, "schedule": "zb-v"},
        {"shard": 1, "schedule": "looped-bfs", "dp": 3, "replica_microbatches": "1,4,2"},
        {"global_batch_size": 17, "micro_batch_size": 0},
        {"model": "tests.ppexec.verification.test_sizes:uneven"},
        {"model": "tests.ppexec.verification.test_sizes:by_targets"},
        {"model": "tests.ppexec.verification.test_sizes:by_loss"},
    ],
    ids=str,
)
def test_unequal_replicas_go_with(changes: dict[str, Any], pool: WorkerPool) -> None:
    config = tiny(**{"schedule": "1f1b", "dp": 2, "microbatches": 0, "replica_microbatches": "5,4", **changes})
    report = verify(config, pool=pool)
    assert report.passed, report.first_difference
    assert report.tolerance > 0 or config.forward_only


def test_each_replica_runs_its_own_schedule_and_the_longest_is_shown(pool: WorkerPool) -> None:
    config = tiny(schedule="zb-v", dp=3, ranks=2, microbatches=0, replica_microbatches="2,5,5")
    assert config.longest_replica == 1
    with Session(config, pool=pool) as session:
        (shown,) = session.measure(1)
        traces = [session.measure(1, replica=replica)[0] for replica in range(3)]
        memory = session.memory()
    assert [trace.schedule.microbatches for trace in (shown, *traces)] == [5, 2, 5, 5]
    assert shown.schedule == config.pipeline == config.pipelines[1]
    for trace in traces:
        last = [max(trace.end_s[list(trace.program.stage == stage)]) for stage in range(4)]
        assert (trace.reduce_start_s >= last).all()
        assert (trace.reduce_end_s > trace.reduce_start_s).all()
    levels = [byte for rank in memory for byte in rank.activation_bytes]
    assert len(levels) == len(config.pipeline.program.stage)
    assert with_memory(shown, memory).activation_bytes.tolist() == levels


def test_a_shorter_replica_waits_for_the_longest(pool: WorkerPool) -> None:
    """Timed compute: the first replica has nothing to do for 9 of 10 microbatches of 30 ms."""
    cost = ppsim.StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, output_bytes=64,
                           parameter_bytes=4096)  # fmt: skip
    config = tiny(dp=2, ranks=1, layers=1, compute="timed", microbatches=0, replica_microbatches="1,10")
    with Session(config, pool=pool, costs=[cost]) as session:
        (short,) = session.measure(1, replica=0)
        (long,) = session.measure(1)
    assert short.step_s > 0.25 > 0.2 > short.makespan_s
    assert long.makespan_s > 0.25


def test_the_bytes_of_the_longest_replica_are_those_predicted(pool: WorkerPool) -> None:
    config = tiny(schedule="1f1b", dp=2, microbatches=0, replica_microbatches="1,4")
    with Session(config, pool=pool) as session:
        stages = session.profile(1).stages
        (trace,) = session.measure(1)
        measured = with_memory(trace, session.memory())
        predicted = with_columns(ppsim.simulate(config.pipeline, stages), receive_window=session.receive_window)
    assert first_difference(predicted, measured) is None


def test_where_a_rank_stands_is_told_in_its_own_replicas_actions() -> None:
    """Rows are numbers of a program: the same number is another action of another replica."""
    config = tiny(schedule="1f1b", dp=2, microbatches=0, replica_microbatches="2,6")
    programs = [pipeline.program for pipeline in config.pipelines]
    board = Board.create(programs, 4)
    assert board is not None
    other = Board.open(programs, 4, board.address)
    for replica, program in enumerate(programs):
        for rank in range(2):
            progress, rows = other.of_rank(2 * replica + rank), program.rows_of(rank)
            progress.begin_step(range(rows.start, rows.stop))
            for row in rows:
                progress.begin_row(row, 1000 + row)
                progress.end_row(row, 2000 + row)
            last = program.action_of(rows.stop - 1)
            assert board.standing(2 * replica + rank) == f"after action {last} of step 1"
    for replica, program in enumerate(programs):
        found = board.partial_trace(2 * replica, 1)
        assert found is not None
        assert found.start_ns.tolist() == [1000 + row for row in range(len(program.stage))]
        assert found.end_ns.tolist() == [2000 + row for row in range(len(program.stage))]
    board.close()
