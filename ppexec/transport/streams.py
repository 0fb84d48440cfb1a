"""Messages on streams: transfers run beside the computations, and the host never waits for them.

sender      compute  | 0F0 |======| 0F1 |====
            to 1            > send 0F0 >      > send 0F1 >
receiver    from 0   post --------> there     post ------> there
            compute                 | 1F0 |                | 1F1 |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from ppexec.machine.device import Device, Event, Mark, Pending, Stream
from ppexec.models.shapes import TensorSpec
from ppexec.transport.transport import outgoing
from ppexec.transport.waits import LostMessage, waits_for, waits_to_send
from ppsim import Program
from ppsim.schedule.streams import Streams

Pair = tuple[int, int]


class Channel(Protocol):
    """A directed link. Work on a stream of this rank calls `send` and `receive`, in the link's order of messages."""

    def send(self, tensor: torch.Tensor, message: int) -> None:
        """Send a tensor; the stream goes on when it has left."""

    def receive(self, tensor: torch.Tensor, message: int) -> None:
        """Receive into a tensor; the stream goes on when it is filled."""


class GroupChannel:
    """A directed link over a process group.

    On NCCL every link needs a group of its own, since one communicator does one transfer at a time.

    Parameters
    ----------
    group : ProcessGroup
        Holds both ends.
    peer : int
        The other end's rank in the group.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        self._group, self._peer = group, peer

    def send(self, tensor: torch.Tensor, message: int) -> None:
        """Send with the message's number as tag (NCCL ignores tags and keeps the order)."""
        self._group.send([tensor], self._peer, message).wait()

    def receive(self, tensor: torch.Tensor, message: int) -> None:
        """Receive with the message's number as tag."""
        self._group.recv([tensor], self._peer, message).wait()


class StreamTransport:
    """One rank's end of all its links, with a stream for each communicator.

    A receive is posted `window` messages ahead of its use, or where it stands in the program, and runs once the
    computations submitted before it are done. The messages of a link are received in the order in which they are sent.
    A send waits on its communicator's stream for the action that produces the message.

    Parameters
    ----------
    program : Program
        What runs.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    rank : int
        This rank of the program.
    device : Device
        Where the rank computes.
    compute : Stream
        The stream of the rank's computations.
    channels : mapping
        (source, destination) -> link, for every link that begins or ends at `rank`.
    window : int or None
        Receives posted ahead on each link, 1 or more. None where they are posted by `post`.
    communicators : "link", "pair" or "rank"
        Who has a communicator, and so a stream here: each link, each other rank, or all links together.
    """

    def __init__(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        *,
        rank: int,
        device: Device,
        compute: Stream,
        channels: Mapping[Pair, Channel],
        window: int | None,
        communicators: Streams = "link",
    ) -> None:
        messages = program.messages
        self.window = window
        self.takes_posts = window is None
        self.sent: dict[int, Mark] = {}
        self.received: dict[int, Mark] = {}
        self._program, self._device, self._compute, self._specs = program, device, compute, list(specs)
        self._pair: list[Pair] = list(zip(messages.source.tolist(), messages.destination.tolist(), strict=True))
        self._channels = dict(channels)
        self._streams = {pair: device.stream(_name(rank, pair, communicators)) for pair in channels}
        self._incoming = {
            pair: np.flatnonzero((messages.source == pair[0]) & (messages.destination == rank)).tolist()
            for pair in channels
            if pair[1] == rank
        }
        self._to_post: dict[Pair, deque[int]] = {}
        self._posted: dict[int, tuple[Pending, Event]] = {}
        self._arrivals: dict[int, Event] = {}

    def use(self, specs: Sequence[TensorSpec]) -> bool:
        """Take the specs of the next steps; any fit."""
        self._specs = list(specs)
        return True

    def start(self) -> None:
        """Post the first receives of every link."""
        self.sent, self.received, self._arrivals = {}, {}, {}
        self._to_post = {pair: deque(messages) for pair, messages in self._incoming.items()}
        for queue in self._to_post.values():
            for _ in range(min(self.window or 0, len(queue))):
                self.post(queue.popleft())

    def post(self, message: int) -> None:
        """Post the receive of a message, behind the computations submitted so far."""
        pair = self._pair[message]
        stream, pending = self._streams[pair], Pending()
        stream.wait(self._compute.record())
        stream.submit(partial(self._receive, message, pending), f"receiving message {message} from rank {pair[0]}")
        self._posted[message] = pending, stream.record()
        self._arrivals[message] = self._posted[message][1]

    def _receive(self, message: int, pending: Pending) -> None:
        tensor = self._specs[message].empty(self._device.torch_device)
        try:
            self._channels[self._pair[message]].receive(tensor, message)
        except RuntimeError as error:
            raise LostMessage(f"{waits_for(self._program, message)}: {error}") from error
        self.received[message] = self._device.mark()
        pending.value = tensor

    def receive(self, message: int) -> Pending:
        """Let the computations wait for a message, then post the next receive of its link."""
        pending, event = self._posted.pop(message)
        self._compute.wait(event)
        queue = self._to_post[self._pair[message]]
        if queue and not self.takes_posts:
            self.post(queue.popleft())
        return pending

    def missing(self) -> str | None:
        """Who waits for whom: the message not there that is needed first; None if all posted receives are done."""
        consumer = self._program.messages.consumer
        late = [message for message, event in self._arrivals.items() if not event.is_done()]
        return waits_for(self._program, min(late, key=lambda message: int(consumer[message]))) if late else None

    @property
    def posted_bytes(self) -> int:
        """Size of the buffers of receives that are posted and not used yet."""
        return sum(self._specs[message].size_bytes for message in self._posted)

    def send(self, message: int, pending: Pending) -> None:
        """Send a message as soon as the computations submitted so far are done."""
        pair = self._pair[message]
        stream = self._streams[pair]
        stream.wait(self._compute.record())
        stream.submit(partial(self._send, message, pending, stream), f"sending message {message} to rank {pair[1]}")

    def _send(self, message: int, pending: Pending, stream: Stream) -> None:
        tensor = outgoing(pending, self._program, message, self._specs[message])
        self.sent[message] = self._device.mark()
        try:
            self._channels[self._pair[message]].send(tensor, message)
        except RuntimeError as error:
            raise LostMessage(f"{waits_to_send(self._program, message)}: {error}") from error
        stream.uses(tensor)

    def finish(self) -> None:
        """Let the computations wait until all sent messages have left."""
        for stream in self._streams.values():
            self._compute.wait(stream.record())


def _name(rank: int, pair: Pair, communicators: Streams) -> str:
    """The stream of a rank's end of the communicator that carries a link."""
    if communicators == "link":
        return f"rank {rank} link {pair[0]} to {pair[1]}"
    peer = pair[1] if pair[0] == rank else pair[0]
    return f"rank {rank} messages" + (f" with {peer}" if communicators == "pair" else "")


class Exchange:
    """Messages under way between ranks of one process; shared by the transports of all ranks.

    Attributes
    ----------
    arriving : dict
        Message -> its tensor and the event of its arrival, from `send` to `receive`.
    received : dict
        Message -> when it arrived.
    compute : dict
        Rank -> the stream of its computations.
    """

    def __init__(self) -> None:
        self.arriving: dict[int, tuple[Pending, Event]] = {}
        self.received: dict[int, Mark] = {}
        self.compute: dict[int, Stream] = {}


class LocalTransport:
    """One rank's end of links within a process: a message is a copy on its link's stream.

    The host must call `send` for a message before `receive`. So it submits the actions of all ranks in a sequence that
    the program allows (see `ppexec.workers.rank.sequence_of`).

    Parameters
    ----------
    program : Program
        What runs.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    rank : int
        This rank of the program.
    device : Device
        Where all ranks compute.
    compute : Stream
        The stream of this rank's computations.
    exchange : Exchange
        The one shared by the transports of all ranks.
    """

    def __init__(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        *,
        rank: int,
        device: Device,
        compute: Stream,
        exchange: Exchange,
    ) -> None:
        messages = program.messages
        self._program, self._specs = program, list(specs)
        self.window: int | None = None
        self.takes_posts = False
        self.sent: dict[int, Mark] = {}
        self.posted_bytes = 0
        self._device, self._compute, self._exchange = device, compute, exchange
        self._destination = messages.destination.tolist()
        self._incoming = np.flatnonzero(messages.destination == rank).tolist()
        self._streams = {
            destination: device.stream(f"link {rank} to {destination}")
            for destination in np.unique(messages.destination[messages.source == rank]).tolist()
        }
        exchange.compute[rank] = compute

    def use(self, specs: Sequence[TensorSpec]) -> bool:
        """Take the specs of the next steps; any fit."""
        self._specs = list(specs)
        return True

    def start(self) -> None:
        """Begin a step."""
        self.sent = {}

    @property
    def received(self) -> dict[int, Mark]:
        """Message -> when it arrived, for the messages to this rank."""
        return {message: self._exchange.received[message] for message in self._incoming}

    def send(self, message: int, pending: Pending) -> None:
        """Copy a message for its receiver as soon as the computations submitted so far are done."""
        stream, arrived = self._streams[self._destination[message]], Pending()
        stream.wait(self._compute.record())
        stream.submit(partial(self._copy, message, pending, arrived), f"copying message {message}")
        self._exchange.arriving[message] = arrived, stream.record()

    def _copy(self, message: int, pending: Pending, arrived: Pending) -> None:
        tensor = outgoing(pending, self._program, message, self._specs[message])
        destination = self._destination[message]
        self.sent[message] = self._device.mark()
        arrived.value = copy = tensor.clone(memory_format=torch.contiguous_format)
        self._exchange.received[message] = self._device.mark()
        self._streams[destination].uses(tensor)
        self._exchange.compute[destination].uses(copy)

    def post(self, message: int) -> None:
        """Nothing: no receives are posted."""

    def receive(self, message: int) -> Pending:
        """Let the computations wait for a message."""
        pending, event = self._exchange.arriving.pop(message)
        self._compute.wait(event)
        return pending

    def finish(self) -> None:
        """Let the computations wait until all sent messages have left."""
        for stream in self._streams.values():
            self._compute.wait(stream.record())
