"""Data-parallel replicas: the same step as one process, up to the rounding of another order of adding up."""

from __future__ import annotations

import pytest
import torch

from ppexec import RunConfig, Session, WorkerPool, verify
from ppexec.models.batch import load_batch
from ppexec.verify.reference import Reference

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
        load_batch(sample, seed=config.seed, step=1, microbatches=2, dp=3, dp_rank=dp_rank, has_first=True,
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
