"""Runtime: runs a program as it is written, and says when everything happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import nn

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.machine.clock import now_ns
from ppexec.machine.device import Pending
from ppexec.models.batch import Batch
from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.stage import Stage
from ppexec.workers.runtime import Runtime
from ppexec.workers.step_record import StepRecord
from ppsim import Schedule, Trace
from tests.support.chains import Case, cases
from tests.support.remote import tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


class Mailbox:
    """A transport for ranks that take turns in one process; it posts nothing ahead."""

    posted_bytes = 0
    takes_posts = False

    def __init__(self) -> None:
        self.messages: dict[int, torch.Tensor] = {}
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}
        self.log: list[str] = []

    def start(self) -> None:
        self.log.append("start")

    def finish(self) -> None:
        self.log.append("finish")

    def send(self, message: int, pending: Pending) -> None:
        assert message not in self.messages
        self.messages[message] = pending.take().clone()
        self.sent[message] = now_ns()

    def receive(self, message: int) -> Pending:
        self.received[message] = now_ns()
        return Pending(self.messages.pop(message))


class Noted(nn.Linear):
    """Writes down what is computed, and when."""

    def __init__(self, stage: int, log: list[str]) -> None:
        super().__init__(2, 2)
        self.stage, self.log = stage, log

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.log.append(f"{self.stage}F")
        output = super().forward(inputs)
        output.register_hook(lambda gradient: self.log.append(f"{self.stage}B"))
        return output


def stages_of(schedule: Schedule, rank: int, make: Callable[[int], nn.Module]) -> dict[int, Stage]:
    last = schedule.stages - 1
    return {
        stage: Stage(
            stage,
            [make(stage)],
            first_layer=stage,
            loss=nn.functional.mse_loss if stage == last else None,
            microbatches=schedule.microbatches,
            trains=not schedule.is_forward_only,
        )
        for stage in schedule.stages_of(rank)
    }


def batch_of(schedule: Schedule) -> Batch:
    values = [torch.full((1, 2), float(b)) for b in range(schedule.microbatches)]
    return Batch(inputs=values, targets=[torch.zeros(1, 2) for _ in values])


ONE_RANK = [
    ["0F0", "0B0", "0F1", "0B1"],
    ["0F1", "0F0", "0B1", "0B0"],
    ["0F0", "1F0", "1B0", "0B0"],
    ["0F0", "0F1", "1F1", "1B1", "0B1", "1F0", "1B0", "0B0"],
]


@pytest.mark.parametrize("order", ONE_RANK)
def test_actions_run_in_the_order_that_is_written(order: list[str]) -> None:
    schedule = Schedule.of([order])
    transport = Mailbox()
    stages = stages_of(schedule, 0, lambda stage: Noted(stage, transport.log))
    record = Runtime(schedule.program, 0, stages, transport).step(batch_of(schedule))  # type: ignore[arg-type]
    assert transport.log == ["start", *(action[:2] for action in order), "finish"]
    assert len(record.start_ns) == len(record.end_ns) == len(order)
    assert all(begin <= end for begin, end in zip(record.start_ns, record.end_ns, strict=True))
    assert (record.sent_ns, record.received_ns, record.outputs, record.levels) == ({}, {}, {}, [])


def test_two_ranks_hand_over_what_the_message_table_says() -> None:
    """Rank 0 runs its forwards, then rank 1 all, then rank 0 its backwards: AFAB, one process after the other."""
    mailbox = Mailbox()
    forward = Schedule.of([["0F0", "0F1"], ["1F0", "1F1"]])
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    batch = batch_of(forward)
    records: list[StepRecord] = []
    for rank in range(2):
        runtime = Runtime(forward.program, rank, stages_of(forward, rank, lambda s: layers[s]), mailbox)  # type: ignore[arg-type]
        records.append(runtime.step(batch, keep_outputs=True))
    assert records[0].sent_ns.keys() == records[1].received_ns.keys() == {0, 1}
    assert mailbox.messages == {}
    with torch.no_grad():
        assert all(torch.equal(records[1].outputs[b], layers[1](layers[0](batch.inputs[b]))) for b in range(2))
    assert records[0].outputs == {}


def test_levels_are_those_after_each_action() -> None:
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"]])
    layer = nn.Linear(2, 2)
    runtime = Runtime(schedule.program, 0, stages_of(schedule, 0, lambda stage: layer), Mailbox())  # type: ignore[arg-type]
    batch = batch_of(schedule)
    record = runtime.step(batch, ledgers={0: Ledger([*tensors_of([layer]), *batch.targets])})
    held = 8 + 8  # input and output, which the loss saves too
    assert record.levels == [held, 2 * held, held, 0]


# What real steps look like, whatever runs


def check_causality(trace: Trace) -> None:
    """No rank does two things at once, and nothing is used before it is there."""
    program = trace.program
    assert trace.start_s.min() == 0
    assert (trace.end_s >= trace.start_s).all()
    for rank in range(trace.ranks):
        rows = list(program.rows_of(rank))
        assert (trace.start_s[rows[1:]] >= trace.end_s[rows[:-1]]).all()
    needing = (program.needs >= 0).nonzero()[0]
    assert (trace.start_s[needing] >= trace.end_s[program.needs[needing]]).all()
    messages = program.messages
    assert (trace.message_start_s >= trace.end_s[messages.producer]).all()
    assert (trace.message_arrival_s >= trace.message_start_s).all()
    assert (trace.message_arrival_s <= trace.start_s[messages.consumer]).all()


@with_workers
@given(case=cases())
def test_no_step_breaks_causality(case: Case, pool: WorkerPool, tmp_path: Path) -> None:
    config = case.config(tmp_path)
    with Session(config, pool=pool) as session:
        for trace in session.measure(2):
            assert trace.clock == "measured"
            assert trace.schedule == config.pipeline
            check_causality(trace)


@pytest.mark.parametrize("schedule", ppsim.schedule_names())
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_runs_and_is_bit_equal(pool: WorkerPool, schedule: str, ranks: int) -> None:
    report = ppexec.verify(tiny(schedule=schedule, ranks=ranks, layers=8, microbatches=2 * ranks), pool=pool)
    assert report.passed
    assert report.gradients_bit_equal


@pytest.mark.parametrize("microbatches", [1, 3, 5])
def test_a_step_with_an_odd_number_of_microbatches_is_bit_equal(pool: WorkerPool, microbatches: int) -> None:
    assert ppexec.verify(tiny(microbatches=microbatches), pool=pool).gradients_bit_equal


def test_an_overlapped_pair_runs_its_forward_and_its_backward(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n")
    assert ppexec.verify(tiny(from_csv=path, microbatches=0), pool=pool).gradients_bit_equal


def test_steps_in_a_row_do_not_add_up(pool: WorkerPool) -> None:
    """Gradients and held microbatches of one step are gone before the next."""
    with Session(tiny(), pool=pool) as session:
        session.measure(2)
        session.count_memory()
        session.profile(1)
        assert session.verify().passed
        assert session.verify().passed
