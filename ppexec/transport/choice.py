"""Carriers: which transport takes a rank's messages, and the memory and buffers that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist

from ppexec.measure.ping import BURSTS, MakeTransport
from ppexec.models.shapes import TensorSpec
from ppexec.transport.gloo import DistributedTransport
from ppexec.transport.shared_memory import LARGEST_BYTES, SharedMemory, SharedTransport, fits, open_memory, size_of
from ppexec.transport.transport import Transport
from ppsim import Program
from ppsim.schedule.deadlock import smallest_receive_window

_BUFFER_BYTES = 16 << 20  # of posted receives, for each link


class Carriers:
    """Opens transports for one rank of a pipeline: through shared memory where that can be.

    group: the pipeline's ranks. window: receives to post ahead on each link; one that is asked for is one of posted
    receives, so that gloo carries everything then, 0 leaves the choice.
    """

    def __init__(self, group: dist.ProcessGroup, *, window: int, timeout_s: float, device: torch.device) -> None:
        self._group, self._window, self._timeout_s, self._device = group, window, timeout_s, device
        self._rank = dist.get_rank(group)

    def open(self, program: Program, specs: Sequence[TensorSpec]) -> Transport:
        """The transport of a program's messages, of which each has its spec. Collective."""
        if not self._window and fits(program, specs) and (memory := self._open_memory(size_of(program, specs))):
            return SharedTransport(program, specs, memory=memory, rank=self._rank)
        window = self._window or _ample_window(program, specs)
        return DistributedTransport(program, specs, group=self._group, window=window, device=self._device)

    def maker(self) -> MakeTransport:
        """The transport that a run would take for messages of given sizes, for two ranks alone to make. Collective."""
        memory = self._probe_memory

        def make(program: Program, specs: Sequence[TensorSpec], window: int) -> Transport:
            if memory is not None and fits(program, specs):
                return SharedTransport(program, specs, memory=memory, rank=self._rank)
            return DistributedTransport(program, specs, group=self._group, window=window, device=self._device)

        return make

    @cached_property
    def _probe_memory(self) -> SharedMemory | None:
        """For a burst of messages; None where gloo carries all."""
        if self._window:
            return None
        return self._open_memory((max(BURSTS) + 1) * LARGEST_BYTES)  # a burst, and words

    def _open_memory(self, size_bytes: int) -> SharedMemory | None:
        return open_memory(size_bytes, group=self._group, timeout=timedelta(seconds=self._timeout_s))


def _ample_window(program: Program, specs: Sequence[TensorSpec]) -> int:
    """The smallest window that suffices and 2 more; but all that some MiB of buffers hold.

    A message moves only once its receive is posted, and to post one costs the sender's answer a wake-up: with small
    messages more than the message.
    """
    largest = max((spec.size_bytes for spec in specs), default=0)
    return max(smallest_receive_window(program) + 2, _BUFFER_BYTES // max(largest, 1))
