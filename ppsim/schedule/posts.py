"""Posts: the sends and receives that a schedule states, each with its place among the actions of its rank."""

from __future__ import annotations

from ppsim.schedule.action import Action, Kind
from ppsim.schedule.placed import PlacedError, PlacedForMicrobatches

SENDS = (Kind.SEND_F, Kind.SEND_B)
MESSAGE_KINDS = (*SENDS, Kind.RECV_F, Kind.RECV_B)


class Posts(PlacedForMicrobatches):
    """A rank's sends and receives, in the sequence in which it posts them. Immutable.

    Parameters
    ----------
    before : array of shape (posts,)
        The action of the rank's order that each stands before, counted from 0; the number of actions for those that
        stand after the last. It never falls.
    stage, kind, microbatch : arrays of shape (posts,)
        What each sends or receives, as in `Action`.

    Raises
    ------
    ScheduleError
        For columns of different lengths, numbers that 32 bits do not hold, other kinds, and places that fall.

    Examples
    --------
    >>> Posts([1, 1], 0, [Kind.SEND_F, Kind.RECV_B], 0)
    Posts(1:0SEND_F0 1:0RECV_B0)
    >>> len(Posts())
    0
    """

    __slots__ = ()

    _kinds = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
    _noun = "a post"

    def __getitem__(self, index: int) -> tuple[int, Action]:
        return int(self.before[index]), Action(
            int(self.stage[index]), Kind(int(self.kind[index])), int(self.microbatch[index])
        )


class PostError(PlacedError):
    """What is wrong with the communication of one rank. `index` says which of its posts."""
