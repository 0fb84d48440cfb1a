"""Posts: the sends and receives that a schedule states, each with its place among the actions of its rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Action, Kind
from ppsim.schedule.placed import Placed, PlacedError

SENDS = (Kind.SEND_F, Kind.SEND_B)
MESSAGE_KINDS = (*SENDS, Kind.RECV_F, Kind.RECV_B)


class Posts(Placed):
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

    __slots__ = ("microbatch",)

    _columns = ("before", "stage", "kind", "microbatch")
    _kinds = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
    _noun = "a post"

    microbatch: npt.NDArray[np.int32]

    def __init__(
        self,
        before: npt.ArrayLike = (),
        stage: npt.ArrayLike = (),
        kind: npt.ArrayLike = (),
        microbatch: npt.ArrayLike = (),
    ) -> None:
        super().__init__(before=before, stage=stage, kind=kind, microbatch=microbatch)

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        columns = (self.before.tolist(), self.stage.tolist(), self.kind.tolist(), self.microbatch.tolist())
        return ((before, Action(stage, Kind(kind), b)) for before, stage, kind, b in zip(*columns, strict=True))

    def __getitem__(self, index: int) -> tuple[int, Action]:
        return int(self.before[index]), Action(
            int(self.stage[index]), Kind(int(self.kind[index])), int(self.microbatch[index])
        )

    def __repr__(self) -> str:
        spelled = [f"{before}:{action}" for before, action in self]
        return f"Posts({' '.join(spelled[:12])}{' ...' if len(spelled) > 12 else ''})"


class PostError(PlacedError):
    """What is wrong with the communication of one rank. `index` says which of its posts."""
