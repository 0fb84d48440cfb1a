"""Transport choice: what carries a run's messages, by device and backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.device import Device, Stream
from ppexec.machine.mesh import pipelines_of
from ppexec.machine.nccl import LinkGroups
from ppexec.models.shapes import TensorSpec
from ppexec.transport.gloo import GlooTransport
from ppexec.transport.shared_memory import LARGEST_BYTES, SharedMemory, SharedTransport, fits, open_memory, size_of
from ppexec.transport.streams import Exchange, GroupChannel, LocalTransport, StreamTransport
from ppexec.transport.transport import MakeTransport, Transport
from ppsim import Program
from ppsim.schedule.deadlock import smallest_receive_window

_BUFFER_BYTES = 16 << 20  # of posted receives, for each link
_PROBED_AT_ONCE = 9  # places for messages of a probe, see `maker`


class TransportChoice:
    """Opens the transports of the ranks in this process.

    Ranks of one process copy. Processes with GPUs use NCCL, with a communicator for each link. Else small messages
    between processes of one machine go through shared memory, and gloo carries the rest.

    group: the pipeline's processes; None if there is but one. window: receives to post ahead on each link; one that is
    asked for is one of posted receives, which shared memory does not have; 0 leaves the choice.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        mesh: DeviceMesh | None,
        device: Device,
        window: int,
        timeout_s: float,
    ) -> None:
        self._group, self._device, self._window, self._timeout_s = group, device, window, timeout_s
        self._links = (
            LinkGroups(pipelines_of(mesh), device, timeout_s)
            if mesh is not None and device.torch_device.type == "cuda"
            else None
        )

    def open(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        computes: Mapping[int, Stream],
        *,
        window: int | None = None,
    ) -> dict[int, Transport]:
        """The transport of each rank that this process holds, for a program whose messages have these specs.

        computes: rank -> the stream of its computations. window: instead of this choice's own. Collective.
        """
        window = self._window if window is None else window
        if self._group is None:
            exchange = Exchange()
            return {
                rank: LocalTransport(program, rank=rank, device=self._device, compute=compute, exchange=exchange)
                for rank, compute in computes.items()
            }
        ((rank, compute),) = computes.items()
        if self._device.is_asynchronous:
            return {rank: self._on_streams(program, specs, rank, compute, window or _ample_window(program, specs))}
        if not window and fits(program, specs) and (memory := self._open_memory(size_of(program, specs))):
            return {rank: SharedTransport(program, specs, memory=memory, rank=rank)}
        window = window or _ample_window(program, specs)
        return {rank: GlooTransport(program, specs, group=self._group, window=window)}

    def _on_streams(
        self, program: Program, specs: Sequence[TensorSpec], rank: int, compute: Stream, window: int
    ) -> StreamTransport:
        links = set(zip(program.messages.source.tolist(), program.messages.destination.tolist(), strict=True))
        if self._links is not None:
            channels = {pair: GroupChannel(*end) for pair, end in self._links.open(links).items()}
        elif self._group is not None:
            channels = {
                pair: GroupChannel(self._group, pair[1] if pair[0] == rank else pair[0])
                for pair in links
                if rank in pair
            }
        return StreamTransport(
            program, specs, rank=rank, device=self._device, compute=compute, channels=channels, window=window
        )

    def maker(self) -> MakeTransport:
        """The transport that a run would take for messages of given sizes, for two processes alone to make. Collective.

        Raises ValueError where ranks share a process or compute on streams: known runs say there what messages cost.
        """
        group, memory = self._group, self._probe_memory
        if group is None or self._device.is_asynchronous:
            raise ValueError("single messages are timed between processes on CPUs: take --backend gloo --device cpu")

        def make(program: Program, specs: Sequence[TensorSpec], window: int) -> Transport:
            if memory is not None and fits(program, specs):
                return SharedTransport(program, specs, memory=memory, rank=dist.get_rank(group))
            return GlooTransport(program, specs, group=group, window=window)

        return make

    @cached_property
    def _probe_memory(self) -> SharedMemory | None:
        """For a burst of messages; None where gloo carries all."""
        if self._window or self._group is None or self._device.is_asynchronous:
            return None
        return self._open_memory(_PROBED_AT_ONCE * LARGEST_BYTES)

    def _open_memory(self, size_bytes: int) -> SharedMemory | None:
        if self._group is None:
            return None
        return open_memory(size_bytes, group=self._group, timeout=timedelta(seconds=self._timeout_s))


def _ample_window(program: Program, specs: Sequence[TensorSpec]) -> int:
    """The smallest window that suffices and 2 more; but all that some MiB of buffers hold.

    A message moves only once its receive is posted, and to post one costs the sender's answer a wake-up: with small
    messages more than the message.
    """
    largest = max((spec.size_bytes for spec in specs), default=0)
    return max(smallest_receive_window(program) + 2, _BUFFER_BYTES // max(largest, 1))
