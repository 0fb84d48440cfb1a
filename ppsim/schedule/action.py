"""Action: one thing that a rank does, spelled as PyTorch's pipelining spells it."""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from ppsim.checks import checked
from ppsim.errors import ScheduleError


class Kind(enum.IntEnum):
    """What an action does.

    F is the forward, B the full backward. A split backward is I, for the input, and W, for the weights. R computes an F
    once more, for its backward. These five compute; the others are communication, sharded parameters, and
    activations that go to host memory (O) and come back (L).
    """

    F = 0
    B = 1
    I = 2  # noqa: E741  (the field's own letter: backward for the input)
    W = 3
    SEND_F = 4
    RECV_F = 5
    SEND_B = 6
    RECV_B = 7
    REDUCE_GRAD = 8
    UNSHARD = 9
    RESHARD = 10
    R = 11  # recompute; behind the others, so that numbers in older files keep their meaning
    O = 12  # noqa: E741  (offload)
    L = 13  # load

    @property
    def computes(self) -> bool:
        """True for F, B, I, W and R: the kinds that take time on a rank."""
        return self in COMPUTE_KINDS

    def __str__(self) -> str:
        return self.name


COMPUTE_KINDS = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R)
"""The kinds that an order holds, ascending."""


class Action(NamedTuple):
    """Stage, kind and microbatch.

    Parameters
    ----------
    stage : int
        The stage, counted from 0.
    kind : Kind
        What is done.
    microbatch : int or None
        The microbatch, counted from 0; None for REDUCE_GRAD, UNSHARD and RESHARD, which concern a stage as a whole.

    Examples
    --------
    >>> str(Action(2, Kind.F, 0))
    '2F0'
    """

    stage: int
    kind: Kind
    microbatch: int | None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.name}{'' if self.microbatch is None else self.microbatch}"


class OverlappedPair(NamedTuple):
    """A forward and a full backward that run as one action.

    Parameters
    ----------
    forward, backward : Action
        The F and the B.

    Examples
    --------
    >>> str(OverlappedPair(Action(0, Kind.F, 3), Action(3, Kind.B, 1)))
    '(0F3;3B1)OVERLAP_F_B'
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


# Longest names first, so that 0SEND_F1 is never read as a shorter kind.
_KIND_NAMES = "|".join(sorted((kind.name for kind in Kind), key=len, reverse=True))
_ACTION = re.compile(rf"(\d+)({_KIND_NAMES})(\d*)", re.ASCII)
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
LARGEST_NUMBER = 2**31 - 1  # orders keep stages and microbatches in 32 bits
_WHOLE_STAGE = {Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD}


@checked
def parse_action(text: str) -> Action | OverlappedPair:
    """Read one action.

    Parameters
    ----------
    text : str
        The spelling of one action, with nothing before or after it.

    Returns
    -------
    Action or OverlappedPair

    Raises
    ------
    ScheduleError
        Repeats the text and shows how an action is spelled.

    Examples
    --------
    >>> parse_action("1B2")
    Action(stage=1, kind=<Kind.B: 1>, microbatch=2)
    """
    pair = _PAIR.fullmatch(text)
    if pair:
        forward, backward = (_parse_single(part, text) for part in pair.groups())
        if (forward.kind, backward.kind) != (Kind.F, Kind.B):
            raise ScheduleError(
                f"{text!r} overlaps {forward.kind} with {backward.kind}: the first part of a pair must be an F "
                "and the second a B, as in (0F3;3B1)OVERLAP_F_B"
            )
        return OverlappedPair(forward, backward)
    return _parse_single(text, text)


def _parse_single(text: str, cell: str) -> Action:
    """Read an action that is no pair; messages repeat the whole cell."""
    match = _ACTION.fullmatch(text)
    if not match:
        raise ScheduleError(
            f"{cell!r} is not an action: write stage, kind, microbatch, as in 2F0, 0B3, 1SEND_F2 or "
            "(0F3;3B1)OVERLAP_F_B"
        )
    stage, name, microbatch = match.groups()
    kind = Kind[name]
    if (microbatch == "") != (kind in _WHOLE_STAGE):
        remedy = "leave its microbatch out" if kind in _WHOLE_STAGE else f"give its microbatch, as in {text}0"
        raise ScheduleError(f"{cell!r} is not an action: {remedy}")
    for what, digits in (("stage", stage), ("microbatch", microbatch)):
        # Digits are counted first: Python refuses to read thousands of them.
        if len(digits) > 100 or int(digits or 0) > LARGEST_NUMBER:
            shown = digits if len(digits) <= 20 else f"{digits[:20]}..."
            raise ScheduleError(f"{what} {shown} is too large: the largest that can be held is {LARGEST_NUMBER}")
    return Action(int(stage), kind, int(microbatch) if microbatch else None)
