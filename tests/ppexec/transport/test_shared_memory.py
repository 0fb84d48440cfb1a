"""Shared memory as a transport: every byte arrives, nobody waits in a send, and a lost rank is an error, not a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ppexec
import ppsim
from ppexec import WorkerPool
from ppexec.machine.device import Pending
from ppexec.measure.tasks import transport_name
from ppexec.models.shapes import TensorSpec
from ppexec.transport.shared_memory import SharedTransport, fits, open_memory, size_of
from ppexec.transport.transport import Transport
from ppsim import Schedule
from tests.support.named import built
from tests.support.remote import on_every_rank
from tests.support.settings import with_workers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks"),
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="gloo carries messages here"),
]

ONE_WAY = "0F0,0F1,0F2\n1F0,1F1,1F2\n"


def got(transport: Transport, message: int) -> torch.Tensor:
    """A message that has come."""
    value = transport.receive(message).value
    assert value is not None
    return value


def opened(
    csv: str, sizes: list[int], timeout_s: float = 60, copies: int = 1
) -> tuple[Schedule, list[TensorSpec], SharedTransport]:
    schedule = Schedule.from_csv(csv, copies=copies)
    count = len(schedule.program.messages)
    specs = [TensorSpec(shape=(sizes[m % len(sizes)],), dtype=torch.float32) for m in range(count)]
    group = dist.group.WORLD
    assert group is not None
    memory = open_memory(size_of(schedule.program, specs), group=group, timeout=timedelta(seconds=timeout_s))
    assert memory is not None
    return schedule, specs, SharedTransport(schedule.program, specs, memory=memory, rank=dist.get_rank())


def content(message: int, step: int, spec: TensorSpec) -> torch.Tensor:
    return torch.full(spec.shape, float(message + 1000 * step), dtype=spec.dtype)


def exchange(csv: str, sizes: list[int], steps: int, copies: int = 1) -> dict[str, Any]:
    """All of a rank's messages, step after step, with contents that tell message and step apart."""
    schedule, specs, transport = opened(csv, sizes, copies=copies)
    right = received = 0
    kept = []
    for step in range(steps):
        transport.start()
        for row in schedule.program.rows_of(dist.get_rank()):
            if (message := int(schedule.program.message_in[row])) >= 0:
                kept.append((message, step, got(transport, message)))
                received += 1
            if (message := int(schedule.program.message_out[row])) >= 0:
                transport.send(message, Pending(content(message, step, specs[message])))
        transport.finish()
    # Looked at last: what was received is the receiver's own and later messages do not touch it.
    right = sum(torch.equal(value, content(message, step, specs[message])) for message, step, value in kept)
    return {"received": received, "right": right}


@with_workers
@given(
    name=st.sampled_from(ppsim.schedule_names()),
    ranks=st.integers(2, 4),
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
)
def test_every_message_of_every_schedule_arrives_unchanged_and_is_the_receivers_own(
    name: str, ranks: int, sizes: list[int], pool: WorkerPool
) -> None:
    schedule = built(name, ranks=ranks, microbatches=2 * ranks)
    ranks = schedule.ranks
    found = on_every_rank(pool, ranks, exchange, csv=schedule.to_csv(), copies=schedule.copies, sizes=sizes, steps=3)
    assert sum(rank["received"] for rank in found) == 3 * len(schedule.program.messages)
    assert all(rank["right"] == rank["received"] for rank in found)


def send_then_change() -> list[list[float]]:
    """All are sent before the receiver looks; one is a view, and all are changed after they were sent."""
    _, _, transport = opened(ONE_WAY, [6])
    values = []
    if dist.get_rank() == 0:
        for message in range(3):
            whole = (torch.arange(12.0) + 100 * message)[::2]
            transport.send(message, Pending(whole))
            whole.zero_()
    dist.barrier()
    if dist.get_rank() == 1:
        values = [got(transport, message).tolist() for message in (2, 0, 1)]
    return values


def test_a_send_returns_at_once_and_carries_what_was_there(pool: WorkerPool) -> None:
    _, values = on_every_rank(pool, 2, send_then_change)
    assert values == [[100.0 * m + 2 * i for i in range(6)] for m in (2, 0, 1)]


def wait_for_nothing() -> str:
    _, _, transport = opened(ONE_WAY, [1], timeout_s=0.2)
    message = ""
    if dist.get_rank() == 1:
        try:
            got(transport, 0)
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_message_that_never_comes_is_an_error_after_the_timeout(pool: WorkerPool) -> None:
    message = on_every_rank(pool, 2, wait_for_nothing)[1]
    assert "rank 1, at action 1F0, waits for message 0 of rank 0 after its action 0F0: timed out after" in message


def wait_for_the_dead() -> tuple[float, str, float]:
    """Rank 0's process is given out to be one that ends after having sent message 0 but not message 1."""
    _, _, transport = opened(ONE_WAY, [1])
    found = (0.0, "", 0.0)
    if dist.get_rank() == 0:
        transport.send(0, Pending(torch.ones(1)))
    dist.barrier()
    if dist.get_rank() == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        whole = transport._memory
        stand_in: Any = SimpleNamespace(**{**vars(whole), "processes": (os.pidfd_open(child.pid), -1)})
        transport._memory = stand_in
        os.kill(child.pid, signal.SIGKILL)
        began = time.monotonic()
        value = float(got(transport, 0))
        try:
            got(transport, 1)
        except RuntimeError as error:
            found = (value, str(error), time.monotonic() - began)
        os.close(stand_in.processes[0])
        child.wait()
    dist.barrier()
    return found


def test_a_dead_sender_is_an_error_at_once_but_what_it_sent_arrives(pool: WorkerPool) -> None:
    """It is not yet reaped then: to be found by its process descriptor, not by its number."""
    value, message, waited_s = on_every_rank(pool, 2, wait_for_the_dead)[1]
    assert value == 1.0
    assert message.startswith("rank 1, at action 1F1, waits for message 1 of rank 0 after its action 0F1: ")
    assert message.endswith("rank 0's process ended")
    assert waited_s < 30  # half of the timeout


@pytest.mark.parametrize(
    ("size_bytes", "microbatches", "shared"),
    [(1 << 20, 8, True), ((1 << 20) + 1, 8, False), (1 << 20, 2000, True), (1 << 20, 5000, False)],
)
def test_what_is_large_goes_another_way(size_bytes: int, microbatches: int, shared: bool) -> None:
    program = ppsim.build_schedule("afab", ranks=2, microbatches=microbatches).program
    assert fits(program, [TensorSpec(shape=(size_bytes,), dtype=torch.uint8)] * len(program.messages)) == shared


def test_without_messages_there_is_nothing_to_share() -> None:
    assert not fits(ppsim.build_schedule("afab", ranks=1, microbatches=2).program, [])


def slots_taken() -> list[int]:
    """Which slots rank 0 takes when nothing is received, when some is, and in a step that overtakes the receiver."""
    _, _, transport = opened(ONE_WAY, [6])
    taken = []

    def send(*messages: int) -> None:
        if dist.get_rank() == 0:
            for message in messages:
                transport.send(message, Pending(torch.full((6,), float(message))))
                taken.append(transport._words[message] - 1)
        dist.barrier()

    def receive(*messages: int) -> None:
        if dist.get_rank() == 1:
            assert [float(got(transport, message)[0]) for message in messages] == [float(m) for m in messages]
        dist.barrier()

    send(0, 1)
    receive(0)
    send(2)  # where 0 was
    receive(2)
    send(0)  # 1 is under way, so nothing sent after it is known to be free
    receive(0, 1)
    send(1)
    receive(1)
    return taken


def test_a_message_takes_a_slot_that_was_used_before_if_one_is_known_to_be_free(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, slots_taken) == [[0, 1, 0, 2, 2], []]


@pytest.mark.parametrize(("flags", "kind"), [({}, "SharedTransport"), ({"receive_window": 2}, "GlooTransport")])
def test_a_run_takes_what_it_can_and_gloo_where_a_window_is_asked_for(
    pool: WorkerPool, flags: dict[str, int], kind: str
) -> None:
    config = ppexec.RunConfig(hidden=8, seq=2, micro_batch_size=1, layers=2, ranks=2, microbatches=4, **flags)
    with ppexec.Session(config, pool=pool) as session:
        assert pool.call(2, transport_name) == [[kind]] * 2
        assert session.verify().gradients_bit_equal


def posted() -> list[int]:
    """Bytes of rank 1's messages to come: all of them, then one less after each use."""
    _, _specs, transport = opened(ONE_WAY, [6])
    transport.start()
    levels = [transport.posted_bytes]
    for message in range(3):
        if dist.get_rank() == 0:
            transport.send(message, Pending(torch.zeros(6)))
        else:
            got(transport, message)
        levels.append(transport.posted_bytes)
    return levels


def test_messages_to_come_are_counted(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, posted) == [[0, 0, 0, 0], [72, 48, 24, 0]]


def descriptors() -> int:
    for _ in range(3):
        opened(ONE_WAY, [1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        opened(ONE_WAY, [1])
    return len(os.listdir("/proc/self/fd")) - before


def test_a_transport_that_is_gone_leaves_nothing_open(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, descriptors) == [0, 0]
