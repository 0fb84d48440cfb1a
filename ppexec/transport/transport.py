"""Transport: the interface between the runtime and what carries its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from ppexec.machine.device import Mark, Pending
from ppexec.models.shapes import TensorSpec
from ppexec.transport.waits import WrongMessage
from ppsim import Program


class Transport(Protocol):
    """One rank's end of all its links. Messages are numbered as in the program's message table.

    Call `start` before every step and `finish` after it.
    """

    @property
    def window(self) -> int | None:
        """How many receive buffers are reserved ahead on each link: posted receives, or slots of shared memory.

        None if none are.
        """

    @property
    def takes_posts(self) -> bool:
        """True if the runtime posts each receive with `post`, where the program states it.

        False if the transport posts receives ahead by itself, or needs none.
        """

    @property
    def sent(self) -> Mapping[int, Mark]:
        """Message -> when this rank handed it over, in this step."""

    @property
    def received(self) -> Mapping[int, Mark]:
        """Message -> when it had arrived at this rank, in this step."""

    @property
    def posted_bytes(self) -> int:
        """Size of the buffers of receives that are posted and not used yet."""

    def use(self, specs: Sequence[TensorSpec]) -> bool:
        """Set the specs of the messages of the next steps.

        False if a message does not fit. The specs are of all messages, so the answer is the same on all ranks, and all
        must open their transports anew.
        """

    def start(self) -> None:
        """Begin a step."""

    def finish(self) -> None:
        """End a step: wait until all sent messages have left."""

    def send(self, message: int, pending: Pending) -> None:
        """Send a tensor once the computations submitted so far are done. The call does not wait for the transfer.

        The computations put the tensor into `pending`. Through shared memory the call waits until the receiver has
        taken the same message of the last step.
        """

    def post(self, message: int) -> None:
        """Post the receive of a message after the computations submitted so far. Only if `takes_posts`."""

    def receive(self, message: int) -> Pending:
        """Let the computations submitted from now on wait for a message. Its tensor belongs to the caller."""


def outgoing(pending: Pending, program: Program, message: int, spec: TensorSpec) -> torch.Tensor:
    """Take the tensor of a message that is to be sent.

    Raises
    ------
    WrongMessage
        If its shape or type is not what was agreed on. The receiver would misread its bytes, or copy a smaller tensor
        to all of a larger one.
    RuntimeError
        If it was not computed yet, a fault of ours.
    """
    tensor: torch.Tensor | None = pending.take()
    if tensor is None:
        raise RuntimeError(f"message {message} was to be sent before it was computed")
    if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
        rank, action = int(program.messages.source[message]), program.action_of(int(program.messages.producer[message]))
        raise WrongMessage(
            f"rank {rank}, action {action} gives {TensorSpec.of(tensor)}, but {spec} was agreed before the step: let "
            "the shape of a layer's output depend on the shape of its input alone"
        )
    return tensor


MakeTransport = Callable[[Program, Sequence[TensorSpec], int], Transport]
"""Makes a transport from a program, the specs of its messages, and the number of receives to post ahead."""
