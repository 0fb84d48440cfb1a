"""Posts: the sends and receives that a schedule states, each with its place among the actions of its rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked, shown
from ppsim.errors import ScheduleError
from ppsim.schedule.action import LARGEST_NUMBER, Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.order import Order, narrowed

SENDS = (Kind.SEND_F, Kind.SEND_B)
MESSAGE_KINDS = (*SENDS, Kind.RECV_F, Kind.RECV_B)
_COLUMNS = ("before", "stage", "kind", "microbatch")


class Posts:
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

    __slots__ = ("before", "kind", "microbatch", "stage")

    def __init__(
        self,
        before: npt.ArrayLike = (),
        stage: npt.ArrayLike = (),
        kind: npt.ArrayLike = (),
        microbatch: npt.ArrayLike = (),
    ) -> None:
        try:
            given = [np.atleast_1d(np.asarray(column)) for column in (before, stage, kind, microbatch)]
            columns = np.broadcast_arrays(*given)
        except (ValueError, TypeError, OverflowError) as error:
            raise ScheduleError(f"the columns of posts must be lists of one length: {error}") from None
        if columns[0].ndim != 1:
            raise ScheduleError(f"the columns of posts must be lists of numbers, got shape {columns[0].shape}")
        largest = (LARGEST_NUMBER, LARGEST_NUMBER, int(Kind.RECV_B), LARGEST_NUMBER)
        self.before, self.stage, self.kind, self.microbatch = (
            narrowed(f"a post's {name}", column, most).astype(np.int32)
            for name, column, most in zip(_COLUMNS, columns, largest, strict=True)
        )
        for name in _COLUMNS:
            getattr(self, name).flags.writeable = False
        if (self.kind < Kind.SEND_F).any():
            raise ScheduleError(f"a post is SEND_F, RECV_F, SEND_B or RECV_B, got kind {Kind(int(self.kind.min()))}")
        if (np.diff(self.before) < 0).any():
            raise ScheduleError(f"posts must stand in their sequence, so `before` never falls: got {shown(before)}")

    def __len__(self) -> int:
        return len(self.before)

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        columns = (self.before.tolist(), self.stage.tolist(), self.kind.tolist(), self.microbatch.tolist())
        return ((before, Action(stage, Kind(kind), b)) for before, stage, kind, b in zip(*columns, strict=True))

    def __getitem__(self, index: int) -> tuple[int, Action]:
        return int(self.before[index]), Action(
            int(self.stage[index]), Kind(int(self.kind[index])), int(self.microbatch[index])
        )

    def take(self, is_kept: npt.NDArray[np.bool_], actions_kept: npt.NDArray[np.bool_]) -> Posts:
        """Some of the posts, among some of the actions.

        Parameters
        ----------
        is_kept : array of shape (posts,)
            Whether each post stays.
        actions_kept : array of shape (actions,)
            Whether each action of the rank's order stays.

        Returns
        -------
        Posts
            Each before the first action that stays of those that stood behind it.
        """
        place = np.concatenate([[0], np.cumsum(actions_kept)])
        before = place[self.before]
        return Posts(before[is_kept], self.stage[is_kept], self.kind[is_kept], self.microbatch[is_kept])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Posts):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _COLUMNS)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name).tobytes() for name in _COLUMNS))

    def __repr__(self) -> str:
        spelled = [f"{before}:{action}" for before, action in self]
        return f"Posts({' '.join(spelled[:12])}{' ...' if len(spelled) > 12 else ''})"


@checked
def split_posts(actions: Iterable[Action | OverlappedPair | str]) -> tuple[Order, Posts]:
    """Part a rank's actions into what it computes, and what it sends and receives between.

    Parameters
    ----------
    actions : iterable of Action, OverlappedPair or str
        In sequence; a str spells an action.

    Returns
    -------
    Order, Posts
        The computations, and the sends and receives with their places among them.

    Raises
    ------
    ScheduleError
        For a str that spells no action, and an action that neither computes nor sends or receives.

    Examples
    --------
    >>> split_posts(["0F0", "0SEND_F0", "0RECV_B0", "0B0"])
    (Order(0F0 0B0), Posts(1:0SEND_F0 1:0RECV_B0))
    """
    computed: list[Action | OverlappedPair] = []
    posted: list[tuple[int, int, int, int]] = []
    for entry in actions:
        action = parse_action(entry) if isinstance(entry, str) else entry
        if isinstance(action, Action) and action.kind in MESSAGE_KINDS and action.microbatch is not None:
            posted.append((len(computed), action.stage, int(action.kind), action.microbatch))
        else:
            computed.append(action)
    return Order.of(computed), Posts(*zip(*posted, strict=True))


class PostError(ScheduleError):
    """What is wrong with the communication of one rank.

    Parameters
    ----------
    rank : int
        The rank.
    index : int or None
        Which of its posts; None for one that is missing.
    what : str
        What is wrong, and the remedy.
    """

    def __init__(self, rank: int, index: int | None, what: str) -> None:
        super().__init__(f"rank {rank}: {what}")
        self.rank, self.index, self.what = rank, index, what


def check_lengths(orders: Sequence[Order], communication: Sequence[Posts]) -> None:
    """Raise ScheduleError unless there are posts for each rank, and all stand within its order."""
    if len(communication) != len(orders):
        raise ScheduleError(f"communication is of {len(communication)} ranks, but there are {len(orders)}: give each's")
    for rank, (order, posts) in enumerate(zip(orders, communication, strict=True)):
        if len(posts) and posts.before[-1] > len(order):
            raise ScheduleError(
                f"rank {rank}: a post stands before action {posts.before[-1]}, but there are {len(order)} actions"
            )
