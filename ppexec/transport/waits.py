"""Waits: who waits for whom, said in one way wherever a message does not come."""

from __future__ import annotations

from ppsim import Program


class LostMessage(RuntimeError):
    """A message did not come or did not leave, since the other rank is gone or too late; it says who waits for whom."""


class WrongMessage(RuntimeError):
    """An action gave another tensor than all ranks had agreed on before the step."""


def waits_for(program: Program, message: int) -> str:
    """Who needs a message for which action, and after which action of whom it is sent.

    Examples
    --------
    >>> from ppsim import build_schedule
    >>> waits_for(build_schedule("1f1b", ranks=2, microbatches=2).program, 0)
    'rank 1, at action 1F0, waits for message 0 of rank 0 after its action 0F0'
    """
    messages = program.messages
    return (
        f"rank {int(messages.destination[message])}, at action {program.action_of(int(messages.consumer[message]))}, "
        f"waits for message {message} of rank {int(messages.source[message])} after its action "
        f"{program.action_of(int(messages.producer[message]))}"
    )


def waits_to_send(program: Program, message: int) -> str:
    """Who has sent a message after which action, and for which action of whom it is.

    Examples
    --------
    >>> from ppsim import build_schedule
    >>> waits_to_send(build_schedule("1f1b", ranks=2, microbatches=2).program, 0)
    'rank 0, after action 0F0, waits until rank 1 takes message 0 for its action 1F0'
    """
    messages = program.messages
    return (
        f"rank {int(messages.source[message])}, after action {program.action_of(int(messages.producer[message]))}, "
        f"waits until rank {int(messages.destination[message])} takes message {message} for its action "
        f"{program.action_of(int(messages.consumer[message]))}"
    )
