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
from ppsim.errors import InputError
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.schedule.streams import Streams

_BUFFER_BYTES = 16 << 20  # of posted receives on each link
_PROBED_AT_ONCE = 9  # a probe sends up to 8 messages at once, and their words need room too


class TransportChoice:
    """Opens the transports of the ranks in this process.

    Ranks that share a process copy tensors. Processes with GPUs use NCCL, with one communicator per link. Between
    processes on CPUs, small messages within one machine go through shared memory, and gloo carries everything else.

    Parameters
    ----------
    group : ProcessGroup or None
        The processes of the pipeline; None if there is only one.
    mesh : DeviceMesh or None
        The processes of the run; None if there is only one.
    device : Device
        Where the ranks of this process compute.
    window : int
        Receives to post ahead on each link. 0 leaves the number to this class. Any other number rules out shared
        memory, which posts no receives.
    timeout_s : float
        How long a rank waits for a message in shared memory.
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
        streams: Streams = "link",
    ) -> dict[int, Transport]:
        """Open the transport of each rank that this process holds. Collective.

        Parameters
        ----------
        program : Program
            What runs.
        specs : sequence of TensorSpec, shape (messages,)
            Shape and type of each message.
        computes : mapping
            Rank -> the stream of its computations, for the ranks of this process.
        window : int or None
            Receives to post ahead on each link; None takes the number given to the class. Without meaning where
            receives are posted where they stand: with other streams than links, or where the schedule states them.
        streams : "link", "pair" or "rank"
            Who has a communicator.

        Returns
        -------
        dict
            Rank -> transport.
        """
        window = self._window if window is None else window
        if self._group is None:
            exchange = Exchange()
            return {
                rank: LocalTransport(program, specs, rank=rank, device=self._device, compute=compute, exchange=exchange)
                for rank, compute in computes.items()
            }
        ((rank, compute),) = computes.items()
        takes_posts = program.is_posted(streams)
        if self._device.is_asynchronous:
            ahead = None if takes_posts else window or _ample_window(program, specs)
            return {rank: self._on_streams(program, specs, rank, compute, ahead, streams)}
        if takes_posts:
            return {rank: GlooTransport(program, specs, group=self._group, window=None)}
        if not window and fits(program, specs) and (memory := self._open_memory(size_of(program, specs))):
            return {rank: SharedTransport(program, specs, memory=memory, rank=rank)}
        window = window or _ample_window(program, specs)
        return {rank: GlooTransport(program, specs, group=self._group, window=window)}

    def _on_streams(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        rank: int,
        compute: Stream,
        window: int | None,
        communicators: Streams,
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
            program,
            specs,
            rank=rank,
            device=self._device,
            compute=compute,
            channels=channels,
            window=window,
            communicators=communicators,
        )

    def maker(self) -> MakeTransport:
        """A function that makes the transport a run would use, between two processes on CPUs. Collective.

        The function itself is not collective: only the two processes at the ends of a link call it.

        Raises
        ------
        InputError
            If ranks share a process or compute on streams.
        """
        group, memory = self._group, self._probe_memory
        if group is None or self._device.is_asynchronous:
            raise InputError("single messages are timed between processes on CPUs: take --backend gloo --device cpu")

        def make(program: Program, specs: Sequence[TensorSpec], window: int) -> Transport:
            if memory is not None and fits(program, specs):
                return SharedTransport(program, specs, memory=memory, rank=dist.get_rank(group))
            return GlooTransport(program, specs, group=group, window=window)

        return make

    @cached_property
    def _probe_memory(self) -> SharedMemory | None:
        """Memory for the messages of a probe; None where gloo carries all messages."""
        if self._window or self._group is None or self._device.is_asynchronous:
            return None
        return self._open_memory(_PROBED_AT_ONCE * LARGEST_BYTES)

    def _open_memory(self, size_bytes: int) -> SharedMemory | None:
        if self._group is None:
            return None
        return open_memory(size_bytes, group=self._group, timeout=timedelta(seconds=self._timeout_s))


def _ample_window(program: Program, specs: Sequence[TensorSpec]) -> int:
    """The smallest window that cannot deadlock, plus 2, or more if that many messages fit in `_BUFFER_BYTES`.

    gloo moves a message only once its receive is posted, and a late receive costs the sender another wake-up. For small
    messages the wake-up takes longer than the transfer, so many receives are posted early.
    """
    largest = max((spec.size_bytes for spec in specs), default=0)
    return max(smallest_receive_window(program) + 2, _BUFFER_BYTES // max(largest, 1))
