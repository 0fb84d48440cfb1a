"""Clock: one time for all ranks."""

from __future__ import annotations

import time

import torch.distributed as dist

from ppexec import WorkerPool
from ppexec.machine.clock import machine_id, now_ns, offset_to_first_ns
from tests.support.remote import on_every_rank

HOUR_NS = 3600 * 10**9


def offset(skew_ns: int, same_machine: bool | None) -> int:
    """As if each rank's clock were ahead of the one before it."""
    rank = dist.get_rank()
    return offset_to_first_ns(dist.group.WORLD, clock=lambda: now_ns() + rank * skew_ns, same_machine=same_machine)


def test_processes_of_one_machine_share_its_clock(pool: WorkerPool) -> None:
    before = now_ns()
    times = on_every_rank(pool, 3, now_ns)
    assert all(before < time < now_ns() for time in times)
    assert on_every_rank(pool, 3, offset, skew_ns=0, same_machine=None) == [0, 0, 0]
    assert len({machine_id(), *on_every_rank(pool, 2, machine_id)}) == 1


def test_across_machines_the_offset_is_found_by_asking(pool: WorkerPool) -> None:
    began = time.perf_counter_ns()
    offsets = on_every_rank(pool, 3, offset, skew_ns=HOUR_NS, same_machine=False)
    longest_round_trip_ns = time.perf_counter_ns() - began
    for rank, found in enumerate(offsets):
        assert abs(found + rank * HOUR_NS) <= longest_round_trip_ns / 2
