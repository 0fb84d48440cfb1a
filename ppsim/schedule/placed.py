"""Placed: entries among a rank's actions, in sequence. The subclasses are sends and receives, sharding, offload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from ppsim.checks import shown
from ppsim.errors import ScheduleError
from ppsim.schedule.action import LARGEST_NUMBER, Action, Kind
from ppsim.schedule.order import Order, narrowed


class Placed(ABC):
    """Entries of one rank, each before an action of the rank's order or after the last. Immutable.

    Parameters
    ----------
    **given : array-likes
        The columns by name: of one length, or one number for all entries.

    Raises
    ------
    ScheduleError
        For columns of different lengths, numbers that 32 bits do not hold, kinds that are not the subclass's, and a
        `before` that decreases.
    """

    __slots__ = ("before", "kind", "stage")

    _columns: ClassVar[tuple[str, ...]] = ("before", "stage", "kind")
    _kinds: ClassVar[tuple[Kind, ...]]  # those that entries may have: consecutive numbers
    _noun: ClassVar[str]  # what an entry is called in messages, with an article

    before: npt.NDArray[np.int32]
    stage: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int32]

    def __init__(self, **given: npt.ArrayLike) -> None:
        name = type(self).__name__
        try:
            columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(column)) for column in given.values()))
        except (ValueError, TypeError, OverflowError) as error:
            raise ScheduleError(f"the columns of {name} must be lists of one length: {error}") from None
        if columns[0].ndim != 1:
            raise ScheduleError(f"the columns of {name} must be lists of numbers, got shape {columns[0].shape}")
        for column, values in zip(given, columns, strict=True):
            largest = int(max(self._kinds)) if column == "kind" else LARGEST_NUMBER
            held = narrowed(f"{self._noun}'s {column}", values, largest).astype(np.int32)
            held.flags.writeable = False
            setattr(self, column, held)
        if (self.kind < min(self._kinds)).any():
            *most, last = (kind.name for kind in self._kinds)
            raise ScheduleError(f"{self._noun} is {', '.join(most)} or {last}, got kind {Kind(int(self.kind.min()))}")
        if (np.diff(self.before) < 0).any():
            raise ScheduleError(
                f"{name} must stand in their sequence, so `before` never falls: got {shown(given['before'])}"
            )

    def __len__(self) -> int:
        return len(self.before)

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Action]]:
        """Each entry's place and what stands there."""

    def __repr__(self) -> str:
        spelled = [f"{before}:{action}" for before, action in self]
        return f"{type(self).__name__}({' '.join(spelled[:12])}{' ...' if len(spelled) > 12 else ''})"

    @property
    def columns(self) -> dict[str, npt.NDArray[np.int32]]:
        """The columns by name, in the sequence of the parameters. Optional ones that are None are left out."""
        found = {name: getattr(self, name) for name in self._columns}
        return {name: column for name, column in found.items() if column is not None}

    def take(self, is_kept: npt.NDArray[np.bool_], actions_kept: npt.NDArray[np.bool_]) -> Self:
        """Some of the entries, among some of the actions.

        Parameters
        ----------
        is_kept : array of shape (entries,)
            Whether each entry is kept.
        actions_kept : array of shape (actions,)
            Whether each action of the rank's order is kept.

        Returns
        -------
        Self
            Each entry stands before the next action that is kept.
        """
        place = np.concatenate([[0], np.cumsum(actions_kept)])
        columns = {name: column[is_kept] for name, column in self.columns.items()}
        return type(self)(**(columns | {"before": place[self.before][is_kept]}))

    def moved(self, place: npt.NDArray[np.integer]) -> Self:
        """The same entries among actions that have moved.

        Parameters
        ----------
        place : array of shape (actions + 1,)
            An entry before action i goes before action `place[i]`. The last value is for entries after the last action.
        """
        return type(self)(**(self.columns | {"before": place[self.before]}))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        mine, its = self.columns, other.columns
        return mine.keys() == its.keys() and all(np.array_equal(mine[name], its[name]) for name in mine)

    def __hash__(self) -> int:
        return hash(tuple(column.tobytes() for column in self.columns.values()))


class PlacedForMicrobatches(Placed):
    """Entries that each concern one microbatch of a stage.

    Parameters
    ----------
    before : array of shape (entries,)
        The action of the rank's order that each stands before, counted from 0; the number of actions for those that
        stand after the last. It never falls.
    stage, kind, microbatch : arrays of shape (entries,)
        What each is, as in `Action`.

    Raises
    ------
    ScheduleError
        As `Placed`.
    """

    __slots__ = ("microbatch",)

    _columns = ("before", "stage", "kind", "microbatch")

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


class PlacedError(ScheduleError):
    """Something is wrong with an entry among the actions of one rank.

    Parameters
    ----------
    rank : int
        The rank.
    index : int or None
        Which of the rank's entries; None for one that is missing.
    what : str
        What is wrong, and the remedy.
    """

    def __init__(self, rank: int, index: int | None, what: str) -> None:
        super().__init__(f"rank {rank}: {what}")
        self.rank, self.index, self.what = rank, index, what


def check_fits_orders(name: str, orders: Sequence[Order], placed: Sequence[Placed]) -> None:
    """Raise ScheduleError unless there are entries for each rank, and all stand within its order."""
    if len(placed) != len(orders):
        raise ScheduleError(f"{name} is of {len(placed)} ranks, but there are {len(orders)}: give one for each")
    for rank, (order, entries) in enumerate(zip(orders, placed, strict=True)):
        if len(entries) and entries.before[-1] > len(order):
            raise ScheduleError(
                f"rank {rank}: {entries._noun} stands before action {entries.before[-1]}, but there are {len(order)} "
                "actions"
            )
