"""Gloo: messages over torch.distributed: asynchronous sends, and receives posted ahead."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from ppexec.machine.clock import now_ns
from ppexec.machine.device import Pending
from ppexec.models.shapes import TensorSpec
from ppexec.transport.transport import outgoing
from ppexec.transport.waits import LostMessage, waits_for, waits_to_send
from ppsim import Program


class GlooTransport:
    """One rank's end of all its links, over a gloo process group.

    Every rank knows the program. So a receiver posts its receives in the order in which the link carries the messages:
    `window` of them ahead of their use, or, with window None, where the program states each. The tag of a message is
    its number.

    Parameters
    ----------
    program : Program
        What runs.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    group : ProcessGroup
        Rank r of the group is rank r of the program.
    window : int or None
        Receives posted ahead on each link, 1 or more. None where they are posted by `post`.
    """

    def __init__(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        *,
        group: dist.ProcessGroup,
        window: int | None,
    ) -> None:
        messages = program.messages
        rank = dist.get_rank(group)
        self.window = window
        self.takes_posts = window is None
        self._group, self._program = group, program
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}
        self._specs = list(specs)
        self._source = messages.source.tolist()
        self._destination = messages.destination.tolist()
        incoming = np.flatnonzero(messages.destination == rank)
        self._from_source: dict[int, list[int]] = {
            int(source): incoming[messages.source[incoming] == source].tolist()
            for source in np.unique(messages.source[incoming])
        }
        self._to_post: dict[int, deque[int]] = {}
        self._posted: dict[int, tuple[dist.Work, torch.Tensor]] = {}
        # By destination, in the sequence of sending. Gloo says that a send has left only to who waits for it.
        self._sending: dict[int, deque[tuple[dist.Work, torch.Tensor, int]]] = defaultdict(deque)
        self._used_in = program.row_action[messages.consumer].tolist()
        self._sent_after = messages.sent_after.tolist()

    def use(self, specs: Sequence[TensorSpec]) -> bool:
        """Set the specs of the next steps. Any fit, since every receive has a buffer of its own."""
        self._specs = list(specs)
        return True

    def start(self) -> None:
        """Post the first receives of every link."""
        self.sent, self.received = {}, {}
        self._to_post = {source: deque(messages) for source, messages in self._from_source.items()}
        for queue in self._to_post.values():
            for _ in range(min(self.window or 0, len(queue))):
                self.post(queue.popleft())

    def post(self, message: int) -> None:
        """Post the receive of a message."""
        buffer = self._specs[message].empty()
        # dist.irecv would spend as long again on checks that are not needed here.
        work = self._group.recv([buffer], self._source[message], message)
        self._posted[message] = (work, buffer)

    def receive(self, message: int) -> Pending:
        """Wait for a message, then post the next receive of its link, unless the runtime posts them."""
        work, buffer = self._posted.pop(message)
        try:
            work.wait()
        except RuntimeError as error:
            raise LostMessage(f"{waits_for(self._program, message)}: {error}") from error
        self.received[message] = now_ns()
        source = self._source[message]
        # What its sender had used when it sent this has left here, so that its tensor need not be kept.
        sending, ended = self._sending[source], self._sent_after[message]
        while sending and self._used_in[sending[0][2]] <= ended:
            self._finish(*sending.popleft())
        queue = self._to_post[source]
        if queue and not self.takes_posts:
            self.post(queue.popleft())
        return Pending(buffer)

    @property
    def posted_bytes(self) -> int:
        """Size of the buffers of receives that are posted and not used yet."""
        return sum(buffer.nbytes for _, buffer in self._posted.values())

    def send(self, message: int, pending: Pending) -> None:
        """Start sending a message. Its tensor is kept until the receiver is known to have used it, or the step ends."""
        self.sent[message] = now_ns()
        tensor = outgoing(pending, self._program, message, self._specs[message]).contiguous()
        destination = self._destination[message]
        work = self._group.send([tensor], destination, message)
        self._sending[destination].append((work, tensor, message))

    def finish(self) -> None:
        """Wait until all sent messages have left."""
        for sending in self._sending.values():
            while sending:
                self._finish(*sending.popleft())

    def _finish(self, work: dist.Work, _: torch.Tensor, message: int) -> None:
        """Wait until a message has left."""
        try:
            work.wait()
        except RuntimeError as error:
            raise LostMessage(f"{waits_to_send(self._program, message)}: {error}") from error
