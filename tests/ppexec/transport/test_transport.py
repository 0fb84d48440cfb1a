"""Transport: nobody waits in a send, receives are posted a window ahead, and every byte arrives where it should."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.machine.device import Pending
from ppexec.measure.link_probe import probe_links
from ppexec.models.shapes import TensorSpec
from ppexec.transport.gloo import GlooTransport
from ppexec.transport.transport import Transport
from ppsim import Schedule, StageCost
from ppsim.schedule.deadlock import smallest_receive_window
from tests.support.named import built
from tests.support.remote import on_every_rank, tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

# Rank 0 sends F2 and F3 while rank 1 sends B0 and B1, and neither has consumed what would free the other's place.
BOTH_SEND_FIRST = "0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3\n1F0,1F1,1B0,1B1,1F2,1F3,1B2,1B3\n"
# Both of rank 0's outputs go to rank 1, which uses them the other way round.
OTHER_WAY_ROUND = "0F0,0F1,0F2,0B2,0B1,0B0\n1F2,1F1,1F0,1B2,1B0,1B1\n"


def got(transport: Transport, message: int) -> torch.Tensor:
    """A message that has come."""
    value = transport.receive(message).value
    assert value is not None
    return value


def content(message: int, spec: TensorSpec) -> torch.Tensor:
    return torch.full(spec.shape, float(message + 1), dtype=spec.dtype)


def exchange(csv: str, sizes: list[int], window: int, steps: int, copies: int = 1) -> dict[str, Any]:
    """All of a rank's messages, in the order of its program, with contents that tell them apart."""
    program = Schedule.from_csv(csv, copies=copies).program
    rank = dist.get_rank()
    specs = [TensorSpec(shape=(sizes[m % len(sizes)],), dtype=torch.float32) for m in range(len(program.messages))]
    transport = GlooTransport(program, specs, group=dist.group.WORLD, window=window)
    right = received = 0
    for _ in range(steps):
        transport.start()
        for row in program.rows_of(rank):
            if (message := int(program.message_in[row])) >= 0:
                value = got(transport, message)
                right += torch.equal(value, content(message, specs[message]))
                received += 1
            if (message := int(program.message_out[row])) >= 0:
                transport.send(message, Pending(content(message, specs[message])))
        transport.finish()
    return {"received": received, "right": right}


@pytest.mark.parametrize("size", [1, 1000, 2**20])
def test_two_ranks_that_both_send_first_finish_with_the_smallest_window(pool: WorkerPool, size: int) -> None:
    """With sends that wait, rank 0 in F3 and rank 1 in B1 would wait for each other for ever."""
    assert smallest_receive_window(Schedule.from_csv(BOTH_SEND_FIRST).program) == 1
    for rank in on_every_rank(pool, 2, exchange, csv=BOTH_SEND_FIRST, sizes=[size], window=1, steps=2):
        assert rank == {"received": 8, "right": 8}


def test_messages_may_be_used_in_another_order_than_the_link_carries_them(pool: WorkerPool) -> None:
    program = Schedule.from_csv(OTHER_WAY_ROUND).program
    window = smallest_receive_window(program)
    assert window == 3
    for rank in on_every_rank(pool, 2, exchange, csv=OTHER_WAY_ROUND, sizes=[5, 70_000, 3], window=window, steps=2):
        assert rank == {"received": 6, "right": 6}


@with_workers
@given(
    name=st.sampled_from(ppsim.schedule_names()),
    ranks=st.integers(2, 4),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    extra=st.integers(0, 3),
)
def test_every_message_of_every_schedule_arrives_unchanged(
    name: str, ranks: int, sizes: list[int], extra: int, pool: WorkerPool
) -> None:
    schedule = built(name, ranks=ranks, microbatches=2 * ranks)
    ranks = schedule.ranks
    window = smallest_receive_window(schedule.program) + extra
    text, copies = schedule.to_csv(), schedule.copies
    found = on_every_rank(pool, ranks, exchange, csv=text, copies=copies, sizes=sizes, window=window, steps=1)
    assert sum(rank["received"] for rank in found) == len(schedule.program.messages)
    assert all(rank["right"] == rank["received"] for rank in found)


def send_what_changes() -> list[float]:
    """A tensor that is not contiguous is sent as it was when it was handed over; its original may go."""
    program = Schedule.from_csv("0F0,0F1\n1F0,1F1\n").program
    specs = [TensorSpec(shape=(3, 2), dtype=torch.float64)] * 2
    transport = GlooTransport(program, specs, group=dist.group.WORLD, window=1)
    transport.start()
    if dist.get_rank() == 0:
        for message in range(2):
            whole = torch.arange(6, dtype=torch.float64).reshape(2, 3) + 10 * message
            transport.send(message, Pending(whole.T))
            del whole
        transport.finish()
        return []
    values = [got(transport, message) for message in range(2)]
    transport.finish()
    return [number for value in values for number in value.flatten().tolist()]


def test_a_view_arrives_in_its_own_order(pool: WorkerPool) -> None:
    _, received = on_every_rank(pool, 2, send_what_changes)
    assert received == [0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15]


def only_send() -> bool:
    """Sends return although nobody has posted a receive, nor will until they have returned."""
    program = Schedule.from_csv("0F0,0F1,0F2\n1F0,1F1,1F2\n").program
    specs = [TensorSpec(shape=(2**20,), dtype=torch.float32)] * 3
    transport = GlooTransport(program, specs, group=dist.group.WORLD, window=1)
    if dist.get_rank() == 0:
        for message in range(3):
            transport.send(message, Pending(content(message, specs[message])))
    dist.barrier()
    transport.start()
    right = True
    if dist.get_rank() == 1:
        right = all(torch.equal(got(transport, message), content(message, specs[message])) for message in range(3))
    transport.finish()
    return right


def test_a_send_returns_before_its_receive_is_posted(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, only_send) == [True, True]


def most_kept() -> int:
    """The largest number of sent tensors that were alive at a time, in 1F1B with eight microbatches."""
    program = ppsim.build_schedule("1f1b", ranks=2, microbatches=8).program
    specs = [TensorSpec(shape=(1000,), dtype=torch.float32)] * len(program.messages)
    transport = GlooTransport(program, specs, group=dist.group.WORLD, window=1)
    transport.start()
    sent: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for row in program.rows_of(dist.get_rank()):
        if (message := int(program.message_in[row])) >= 0:
            got(transport, message)
        if (message := int(program.message_out[row])) >= 0:
            tensor = content(message, specs[message])
            sent.append(weakref.ref(tensor))
            transport.send(message, Pending(tensor))
            del tensor
        most = max(most, sum(each() is not None for each in sent))
    transport.finish()
    assert not any(each() is not None for each in sent)
    return most


def test_a_sent_tensor_is_dropped_once_its_receiver_has_answered(pool: WorkerPool) -> None:
    """gloo calls no send complete before somebody waits for it: all were kept to the end of the step."""
    assert on_every_rank(pool, 2, most_kept) == [2, 2]


# In whole runs


@pytest.mark.parametrize("output_bytes", [1, 1000, 4 * 2**20])
def test_timed_stages_send_messages_of_any_size(pool: WorkerPool, tmp_path: Path, output_bytes: int) -> None:
    path = tmp_path / "both.csv"
    path.write_text(BOTH_SEND_FIRST)
    cost = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0, output_bytes=output_bytes)
    config = tiny(from_csv=path, receive_window=1)
    with Session(config, pool=pool, costs=[cost, cost]) as session:
        traces = session.measure(2)
    assert all((trace.message_bytes == output_bytes).all() for trace in traces)
    assert all((trace.message_arrival_s >= trace.message_start_s).all() for trace in traces)


@pytest.mark.parametrize("csv", [BOTH_SEND_FIRST, OTHER_WAY_ROUND])
@pytest.mark.parametrize("more", [0, 1, 50])
def test_the_window_changes_nothing_that_is_computed(pool: WorkerPool, tmp_path: Path, csv: str, more: int) -> None:
    path = tmp_path / "order.csv"
    path.write_text(csv)
    window = smallest_receive_window(Schedule.from_csv(csv).program) + more
    assert ppexec.verify(tiny(from_csv=path, microbatches=0, receive_window=window), pool=pool).passed


def test_a_window_in_which_a_receive_would_never_be_posted_is_refused(tmp_path: Path) -> None:
    """Rank 1 uses the third message first; with room for two the run had ended in a KeyError."""
    path = tmp_path / "order.csv"
    path.write_text(OTHER_WAY_ROUND)
    with pytest.raises(ValueError, match=r"receive_window 2 is too small: .* 3 receives .*take 3 or more"):
        tiny(from_csv=path, microbatches=0, receive_window=2)


# Probe


def probed(csv: str, sizes: list[int]) -> list[tuple[int, int, int, float]]:
    program = Schedule.from_csv(csv).program
    specs = [TensorSpec(shape=(sizes[m % len(sizes)],), dtype=torch.uint8) for m in range(len(program.messages))]
    samples = probe_links(program, specs, dist.group.WORLD)
    return [(s.source, s.destination, s.size_bytes, s.one_way_s) for s in samples]


def test_every_link_is_probed_by_its_sender(pool: WorkerPool) -> None:
    schedule = ppsim.build_schedule("afab", ranks=3, microbatches=2)
    by_rank = on_every_rank(pool, 3, probed, csv=schedule.to_csv(), sizes=[1000])
    found = [(source, destination) for samples in by_rank for source, destination, _, _ in samples]
    assert sorted(found) == schedule.program.links()
    assert all(source == rank for rank, samples in enumerate(by_rank) for source, _, _, _ in samples)
    assert all(size == 1000 and one_way_s > 0 for samples in by_rank for _, _, size, one_way_s in samples)
