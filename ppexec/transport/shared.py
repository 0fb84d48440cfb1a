"""Messages through memory that the ranks of one machine share: what is small is copied, and nobody is woken."""

from __future__ import annotations

import mmap
import os
import platform
import select
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ppexec.clock import machine_id, now_ns
from ppexec.shapes import TensorSpec
from ppsim import Program

_LARGEST_BYTES = 1 << 20  # of a message: beyond, two copies by the ranks cost more than waking a thread that copies
_MOST_BYTES = 64 << 20  # of all messages of a step
_ALIGNMENT_BYTES = 64
_AWAKE_NS = 300_000  # as long as falling asleep and being woken takes
_ASLEEP_S = 50e-6


class SharedTransport:
    """One rank's end of all its links, each message of a step having its own place in shared memory.

    A message is two copies and a flag. So nobody waits in a send, and messages may be used in any order. A receiver
    looks for its flag, giving way to whoever has work, for as long as it would take to be woken; then it sleeps between
    looks. Ranks that outnumber the cores sleep at once. A receiver raises RuntimeError when the sender's process has
    ended, or after the group's timeout.

    Same names and meanings as DistributedTransport's. memory: of all messages, one after the other (see `open_shared`).
    processes: what tells that a rank's process has ended, by rank.
    """

    def __init__(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        *,
        memory: mmap.mmap,
        processes: Sequence[int],
        timeout: timedelta,
        spins: bool,
    ) -> None:
        self._timeout_ns = round(timeout.total_seconds() * 1e9)
        self._awake_ns = _AWAKE_NS if spins else 0
        self._processes = processes
        self._source, self._destination = program.messages.source.tolist(), program.messages.destination.tolist()
        self._is_full = memoryview(memory)[: 8 * len(specs)].cast("q")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._places = [
            whole[start : start + spec.size_bytes].view(spec.dtype).view(spec.shape)
            for spec, start in zip(specs, _starts(specs), strict=False)
        ]
        weakref.finalize(self, _close, processes)

    def start(self) -> None:
        """Nothing has to be posted."""

    def finish(self) -> None:
        """Nothing is under way."""

    def send(self, message: int, tensor: torch.Tensor) -> None:
        """Copy a message to its place; only a receiver that is a whole step behind is waited for."""
        if self._is_full[message]:
            self._wait_until(0, message, self._destination[message])
        self._places[message].copy_(tensor)
        self._is_full[message] = 1

    def receive(self, message: int) -> torch.Tensor:
        """Wait for a message; the copy is the receiver's own."""
        if not self._is_full[message]:
            self._wait_until(1, message, self._source[message])
        tensor = self._places[message].clone()
        self._is_full[message] = 0
        return tensor

    def _wait_until(self, state: int, message: int, peer: int) -> None:
        is_full, began = self._is_full, now_ns()
        while is_full[message] != state:
            waited_ns = now_ns() - began
            if waited_ns < self._awake_ns:
                os.sched_yield()
                continue
            ended, _, _ = select.select([self._processes[peer]], [], [], _ASLEEP_S)
            if is_full[message] == state:
                return
            if ended:
                raise RuntimeError(f"rank {peer}'s process ended before message {message} had gone through")
            if waited_ns > self._timeout_ns:
                raise RuntimeError(f"waited {waited_ns / 1e9:.0f} s for rank {peer} and message {message}: timed out")


def open_shared(
    program: Program, specs: Sequence[TensorSpec], *, group: dist.ProcessGroup, timeout: timedelta
) -> SharedTransport | None:
    """A shared transport if all ranks of the group can have one and its messages are small, else None. Collective.

    The memory has no name, so that none is left behind by a killed process; the others find it through its owner.
    What one core stores must be seen by others in the order of the program, as on x86-64.
    """
    size_bytes = _starts(specs)[-1]
    fits = len(specs) > 0 and size_bytes <= _MOST_BYTES and max(spec.size_bytes for spec in specs) <= _LARGEST_BYTES
    places = _gathered(_place() if fits else None, group)
    if places[0] is None or len(set(places)) > 1:
        return None
    owned = _create(size_bytes) if dist.get_rank(group) == 0 else -1
    ends = _gathered((os.getpid(), owned), group)
    memory, processes = _find(ends, size_bytes)
    everybody_has_it = all(_gathered(memory is not None, group))  # also the moment from which its owner may close it
    if owned >= 0:
        os.close(owned)
    if memory is None or not everybody_has_it:
        _close(processes)
        return None
    cores = len(os.sched_getaffinity(0))
    spins = dist.get_world_size() * torch.get_num_threads() <= cores
    return SharedTransport(program, specs, memory=memory, processes=processes, timeout=timeout, spins=spins)


def _starts(specs: Sequence[TensorSpec]) -> list[int]:
    """Where each message has its place, after the flags of all; and where the last one ends."""
    starts = [_aligned(8 * len(specs))]
    for spec in specs:
        starts.append(starts[-1] + _aligned(spec.size_bytes))
    return starts


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _place() -> tuple[str, str] | None:
    """Where process ids mean the same as here; None if what is needed is not there."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
        return None
    try:
        return machine_id(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _create(size_bytes: int) -> int:
    """A descriptor of new memory, all zeros; -1 if there is none to be had."""
    try:
        descriptor = os.memfd_create("messages")
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        return -1
    return descriptor


def _find(ends: Sequence[tuple[int, int]], size_bytes: int) -> tuple[mmap.mmap | None, list[int]]:
    """The first rank's memory, and what tells that a process has ended; None if it may not be had."""
    processes: list[int] = []
    try:
        owner, owned = ends[0]
        descriptor = os.open(f"/proc/{owner}/fd/{owned}", os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        processes += [os.pidfd_open(process) for process, _ in ends]
    except OSError:
        return None, processes
    return memory, processes


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
