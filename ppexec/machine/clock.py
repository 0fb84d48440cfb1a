"""Clock: one clock for the times of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

_ROUNDS = 20  # questions of each rank; the answer that came back fastest counts


now_ns = time.perf_counter_ns
"""Nanoseconds of this machine's monotonic clock, which all its processes share."""


def machine_id() -> str:
    """An identity of this machine's clock: that of its boot on Linux, else its host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import platform

        return platform.node()


def offset_to_first_ns(
    group: dist.ProcessGroup, *, clock: Callable[[], int] = now_ns, same_machine: bool | None = None
) -> int:
    """What to add to this rank's clock to read the clock of the group's first rank. Collective.

    Parameters
    ----------
    group : ProcessGroup
        The ranks. Its backend must send CPU tensors (gloo).
    clock : callable
        Reads this rank's clock, in nanoseconds.
    same_machine : bool or None
        Whether all ranks share one clock; None finds out.

    Returns
    -------
    int
        Nanoseconds; 0 on one machine.

    Notes
    -----
    Across machines each rank in turn asks the first rank for its time repeatedly, and keeps the answer with the
    shortest round trip. The result is off by at most half of that round trip (Cristian, Probabilistic clock
    synchronization, 1989).
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if same_machine is None:
        machines: list[str] = [""] * size
        dist.all_gather_object(machines, machine_id(), group=group)
        same_machine = len(set(machines)) == 1
    if same_machine:
        return 0
    offset = 0
    for other in range(1, size):
        if rank == 0:
            _answer(group, other, clock)
        elif rank == other:
            offset = _ask(group, clock)
    return offset


def _answer(group: dist.ProcessGroup, other: int, clock: Callable[[], int]) -> None:
    message = torch.zeros(1, dtype=torch.int64)
    for _ in range(_ROUNDS):
        dist.recv(message, group_src=other, group=group)
        message[0] = clock()
        dist.send(message, group_dst=other, group=group)


def _ask(group: dist.ProcessGroup, clock: Callable[[], int]) -> int:
    message = torch.zeros(1, dtype=torch.int64)
    answers: list[tuple[int, int]] = []  # round trip and offset
    for _ in range(_ROUNDS):
        asked = clock()
        dist.send(message, group_dst=0, group=group)
        dist.recv(message, group_src=0, group=group)
        returned = clock()
        answers.append((returned - asked, int(message[0]) - (asked + returned) // 2))
    return min(answers)[1]
