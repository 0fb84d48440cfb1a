"""Threaded schedules: on streams beside the host every schedule computes, holds and sends what it does without them.

The host is done before the streams are. What reads, frees or overwrites too early shows here, as it would on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ppexec
import ppsim
from ppexec import Model, RunConfig, Session, WorkerError, WorkerPool
from ppsim import Trace
from tests.support.causality import check_causality
from tests.support.named import allowed
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

HERE = "tests.ppexec.machine.test_threaded_schedules"
EVERYTHING = {"model": "gpt", "dropout": 0.1, "tied": True, "recompute": True}


def threaded(**changes: Any) -> RunConfig:
    """A process for each rank."""
    return tiny(**{"device": "threads", **changes})


def local(**changes: Any) -> RunConfig:
    """All ranks in one process, each with a thread to compute and one for each link."""
    return threaded(**{"backend": "local", **changes})


# One process


@pytest.mark.parametrize("schedule", ppsim.schedule_names())
def test_every_schedule_is_bit_equal_and_in_order_and_holds_what_is_predicted(pool: WorkerPool, schedule: str) -> None:
    ranks, microbatches = allowed(schedule, 3, 6)
    config = local(schedule=schedule, ranks=ranks, layers=2 * ranks, microbatches=microbatches)
    with Session(config, pool=pool) as session:
        report = session.verify()
        (trace,) = session.measure(1)
        counted, stages = session.count_memory(), session.profile(1).stages
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal
    assert trace.schedule == config.pipeline
    check_causality(trace)
    predicted = ppsim.simulate(config.pipeline, stages)
    assert trace.message_bytes.tolist() == predicted.message_bytes.tolist()
    assert [level for rank in counted for level in rank] == predicted.activation_bytes.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "1f1b", "recompute": True},
        {"schedule": "1f1b", "model": "gpt", "dropout": 0.1},
        {"schedule": "zb-h1", "model": "gpt", "recompute": True, "dropout": 0.1},
        {"schedule": "interleaved-1f1b", "model": "gpt", "layers": 2, "microbatches": 1, "ranks": 1},
        {"schedule": "afab", "microbatches": 40, "layers": 2},  # the host gets far ahead and has to wait
        {"schedule": "1f1b", "forward_only": True},
        {"schedule": "dualpipe-v", "dtype": "float64"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_whatever_the_stages_do_is_bit_equal(pool: WorkerPool, changes: dict[str, Any]) -> None:
    report = ppexec.verify(local(**changes), pool=pool)
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal


def test_tied_weights_are_added_up_when_all_ranks_are_done(pool: WorkerPool) -> None:
    """Two stages' gradients of one weight are added in another order than one process adds them."""
    report = ppexec.verify(local(schedule="zb-v", **EVERYTHING), pool=pool)
    assert report.passed
    assert report.outputs_bit_equal


def test_steps_in_a_row_do_not_add_up(pool: WorkerPool) -> None:
    """Nothing of one step is under way in the next."""
    with Session(local(schedule="zb-h1"), pool=pool) as session:
        for trace in session.measure(3):
            check_causality(trace)
        assert session.verify().gradients_bit_equal


# A process for each rank


def both_ways(pool: WorkerPool, **changes: Any) -> list[tuple[Trace, list[list[int]]]]:
    """A step's trace and the bytes that each rank holds after each action: with threads, and without."""
    found = []
    for config in (threaded(**changes), tiny(**changes)):
        with Session(config, pool=pool) as session:
            (trace,) = session.measure(1)
            found.append((trace, session.count_memory()))
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_a_trace_is_that_of_the_synchronous_run_but_for_its_times(pool: WorkerPool, schedule: str) -> None:
    (trace, held), (expected, expected_held) = both_ways(pool, schedule=schedule)
    check_causality(trace)
    frame, other = (each.to_frame().sort_values(["rank", "start_s"]) for each in (trace, expected))
    columns = ["rank", "stage", "kind", "microbatch"]
    computed, also = (each[each.kind.isin(["F", "B", "I", "W"])][columns].values.tolist() for each in (frame, other))
    assert computed == also
    assert trace.message_bytes.tolist() == expected.message_bytes.tolist()
    assert held == expected_held


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "zb-h1"},
        {"schedule": "1f1b", "receive_window": 1},
        {"schedule": "dualpipe-v"},
    ],  # the last has B and I
    ids=str,
)
def test_ranks_in_processes_of_their_own_are_bit_equal(pool: WorkerPool, changes: dict[str, Any]) -> None:
    report = ppexec.verify(threaded(**changes), pool=pool)
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal


@pytest.mark.parametrize(
    "changes",
    [
        {"dp": 2, "schedule": "zb-h1"},
        {"tp": 2, "schedule": "1f1b", "dtype": "float64"},
        {"dp": 2, "tp": 2, "schedule": "zb-v", "dtype": "float64", **EVERYTHING},
    ],
    ids=["dp", "tp", "dp and tp of a GPT"],
)
def test_meshes_compute_what_one_process_computes(pool: WorkerPool, changes: dict[str, Any]) -> None:
    with Session(threaded(**changes), pool=pool) as session:
        report = session.verify()
        (trace,) = session.measure(1)
    assert report.passed
    check_causality(trace)
    if "dp" in changes:  # a stage's gradients are added up after its last backward
        assert trace.reduce_start_s is not None
        last = [trace.end_s[trace.program.stage == stage].max() for stage in range(trace.schedule.stages)]
        assert (trace.reduce_start_s >= last).all()


# What fails


class Fails(nn.Linear):
    """Raises in the third forward of a step, or in that one's backward. Zeros are what it is warmed up with."""

    def __init__(self, width: int, in_backward: bool) -> None:
        super().__init__(width, width)
        self.in_backward, self.forwards = in_backward, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        self.forwards += 0 if inputs.is_meta else int(inputs.any())
        if self.forwards != 3:
            return outputs
        if not self.in_backward:
            raise ArithmeticError("this kernel fails")
        outputs.register_hook(self.fail)
        return outputs

    def fail(self, gradient: torch.Tensor) -> None:
        raise ArithmeticError("this kernel fails")


def failing(config: RunConfig, *, in_backward: bool) -> Model:
    """Identities and then the layer that fails; samples of ones."""
    width = config.hidden
    return Model(
        layers=[*[nn.Identity() for _ in range(config.layers - 1)], Fails(width, in_backward)],
        sample=lambda index: (torch.ones(1, width), torch.zeros(1, width)),
        loss=nn.functional.mse_loss,
    )


def failing_forward(config: RunConfig) -> Model:
    return failing(config, in_backward=False)


def failing_backward(config: RunConfig) -> Model:
    return failing(config, in_backward=True)


@pytest.mark.parametrize("backend", ["local", "gloo"])
@pytest.mark.parametrize(
    ("factory", "schedule", "where"),
    [
        ("failing_forward", "1f1b", "rank 1, action 1F2"),
        ("failing_backward", "1f1b", "rank 1, action 1B2"),
        ("failing_forward", "zb-v", "rank 0, action 3F2"),
    ],
)
def test_a_kernel_that_fails_is_reported_with_rank_and_action(
    pool: WorkerPool, backend: str, factory: str, schedule: str, where: str
) -> None:
    """The host has long submitted the rest of the step; the streams skip it, and nobody waits for ever."""
    config = threaded(backend=backend, schedule=schedule, model=f"{HERE}:{factory}", timeout_s=20)
    said = rf"failed in {where}: .* raised ArithmeticError: this kernel fails"
    with Session(config, pool=pool) as session, pytest.raises(WorkerError, match=said):
        session.measure(1)
