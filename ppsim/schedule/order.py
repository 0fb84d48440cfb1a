"""Order: what one rank computes, in sequence; and the functions that schedules are written with.

An order is held as integer arrays and shown as Actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked, shown
from ppsim.errors import InputError, ScheduleError
from ppsim.schedule.action import COMPUTE_KINDS, LARGEST_NUMBER, Action, Kind, OverlappedPair, parse_action

Integers = npt.NDArray[np.integer]
_COMPUTING = f"{', '.join(kind.name for kind in COMPUTE_KINDS[:-1])} or {COMPUTE_KINDS[-1].name}"


class Order(Sequence[Action | OverlappedPair]):
    """A rank's compute actions, in sequence. Immutable.

    Parameters
    ----------
    stage, kind, microbatch : arrays of shape (parts,), or single numbers
        What each part computes. An action is one part; an overlapped pair is two, its forward first.
    joined : array of shape (parts,), or a single bool
        True for the forward of a pair.

    Raises
    ------
    ScheduleError
        For numbers that 32 bits do not hold, kinds that do not compute, and pairs that are not one F and then one B.

    Notes
    -----
    `len(order)` counts actions, `len(order.stage)` counts parts. Eight million actions take 80 MB; as a list of Action
    they would take gigabytes.

    Examples
    --------
    >>> order = forwards(0, range(2)) + backwards(0, range(2))
    >>> order
    Order(0F0 0F1 0B0 0B1)
    >>> str(order[2]), len(order)
    ('0B0', 4)
    """

    __slots__ = ("_starts", "joined", "kind", "microbatch", "stage")

    def __init__(
        self, stage: npt.ArrayLike, kind: npt.ArrayLike, microbatch: npt.ArrayLike, joined: npt.ArrayLike = False
    ) -> None:
        try:
            given = [np.atleast_1d(np.asarray(column)) for column in (stage, kind, microbatch, joined)]
            shape = np.broadcast_shapes(*(column.shape for column in given))
        except (ValueError, TypeError, OverflowError) as error:
            raise ScheduleError(f"stage, kind, microbatch and joined must be lists of one length: {error}") from None
        if len(shape) != 1:
            raise ScheduleError(f"stage, kind and microbatch must be lists of numbers, got shape {shape}")
        self.stage = np.full(shape, narrowed("an order's stage", given[0], LARGEST_NUMBER), np.int32)
        self.kind = np.full(shape, narrowed("an order's kind", given[1], int(Kind.R)), np.int8)
        if (communicates := (self.kind > Kind.W) & (self.kind < Kind.R)).any():
            found = Kind(int(self.kind[np.argmax(communicates)]))
            raise ScheduleError(f"an order's kind must be {_COMPUTING}, got {found}, which does not compute")
        self.microbatch = np.full(shape, narrowed("an order's microbatch", given[2], LARGEST_NUMBER), np.int32)
        if given[3].dtype.kind not in "biuf":
            raise ScheduleError(f"joined must be True or False for each part, got {shown(joined)}")
        self.joined = np.full(shape, given[3], bool)
        if self.joined.any():
            self._check_pairs()
        self._freeze()

    @classmethod
    def _of_orders(
        cls,
        stage: npt.NDArray[np.int32],
        kind: npt.NDArray[np.int8],
        microbatch: npt.NDArray[np.int32],
        joined: npt.NDArray[np.bool_],
    ) -> Order:
        """An order of columns that are known to be right. To check a short order takes longer than to make it."""
        order = cls.__new__(cls)
        order.stage, order.kind, order.microbatch, order.joined = stage, kind, microbatch, joined
        order._freeze()
        return order

    def _freeze(self) -> None:
        for column in self._columns:
            column.flags.writeable = False
        self._starts: Integers | None = None

    @property
    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.stage, self.kind, self.microbatch, self.joined

    def _check_pairs(self) -> None:
        """Every part that is joined to the next is an F, and the next is a B that is joined to nothing more."""
        first = np.flatnonzero(self.joined)
        is_pair = first + 1 < len(self.joined)
        second = np.where(is_pair, first + 1, first)
        is_pair &= (self.kind[first] == Kind.F) & (self.kind[second] == Kind.B) & ~self.joined[second]
        if not is_pair.all():
            part = int(first[np.argmin(is_pair)])
            raise ScheduleError(
                f"part {part} is joined to the next: a pair is an F and then a B, as (0F3;3B1)OVERLAP_F_B"
            )

    @classmethod
    @checked
    def of(cls, actions: Iterable[Action | OverlappedPair | str]) -> Order:
        """An order from actions or their spellings.

        Raises
        ------
        ScheduleError
            For a spelling that is no action, and for an action that does not compute.

        Examples
        --------
        >>> Order.of(["0F0", "0B0"])
        Order(0F0 0B0)
        """
        rows: list[tuple[int, int, int, bool]] = []
        for entry in actions:
            action = parse_action(entry) if isinstance(entry, str) else entry
            parts = tuple(action) if isinstance(action, OverlappedPair) else (action,)
            for part in parts:
                if not part.kind.computes or part.microbatch is None:
                    raise ScheduleError(
                        f"{part} does not compute: an order holds {_COMPUTING} and overlapped pairs; messages follow "
                        "from it and are added by lowering, or are given to `Schedule.of` together with it"
                    )
                rows.append((part.stage, int(part.kind), part.microbatch, len(parts) == 2 and part is parts[0]))
        if not rows:
            return cls([], [], [], [])
        return cls(*zip(*rows, strict=True))

    @property
    def starts(self) -> Integers:
        """The index of the first part of each action, shape (actions,)."""
        if self._starts is None:
            follows = np.zeros(len(self.joined), bool)
            follows[1:] = self.joined[:-1]
            self._starts = np.flatnonzero(~follows)
        return self._starts

    @checked
    def take(self, parts: npt.ArrayLike) -> Order:
        """The parts at these indices, or where this mask is set; pairs become single actions."""
        index = np.atleast_1d(np.asarray(parts))
        if not index.size:  # of an empty list or range NumPy makes floats
            index = index.astype(np.intp)
        if index.ndim > 1 or index.dtype.kind not in "bi" or (index.size and not self._has(index)):
            count = len(self.stage)
            raise ScheduleError(f"parts must be indices below {count}, or a mask of {count}, got {shown(parts)}")
        stage = self.stage[index]
        return Order._of_orders(stage, self.kind[index], self.microbatch[index], np.zeros(len(stage), bool))

    def _has(self, index: npt.NDArray[Any]) -> bool:
        if index.dtype.kind == "b":
            return index.shape == self.stage.shape
        return bool(index.min() >= -len(self.stage) and index.max() < len(self.stage))

    def __len__(self) -> int:
        return len(self.starts)

    def _action_at(self, part: int) -> Action | OverlappedPair:
        first = Action(int(self.stage[part]), Kind(int(self.kind[part])), int(self.microbatch[part]))
        if not self.joined[part]:
            return first
        second = Action(int(self.stage[part + 1]), Kind(int(self.kind[part + 1])), int(self.microbatch[part + 1]))
        return OverlappedPair(first, second)

    @overload
    def __getitem__(self, index: int) -> Action | OverlappedPair: ...

    @overload
    def __getitem__(self, index: slice) -> list[Action | OverlappedPair]: ...

    def __getitem__(self, index: int | slice) -> Action | OverlappedPair | list[Action | OverlappedPair]:
        if isinstance(index, slice):
            return [self._action_at(int(part)) for part in self.starts[index]]
        return self._action_at(int(self.starts[index]))

    def __iter__(self) -> Iterator[Action | OverlappedPair]:
        kinds = tuple(Kind)
        parts = [
            Action(s, kinds[k], b)
            for s, k, b in zip(self.stage.tolist(), self.kind.tolist(), self.microbatch.tolist(), strict=True)
        ]
        if not self.joined.any():
            return iter(parts)
        return (OverlappedPair(parts[i], parts[i + 1]) if self.joined[i] else parts[i] for i in self.starts.tolist())

    def __add__(self, other: Order) -> Order:
        return concatenate([self, other])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Order):
            return all(map(np.array_equal, self._columns, other._columns))
        if isinstance(other, Sequence) and not isinstance(other, str):
            return list(self) == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.stage.tobytes(), self.kind.tobytes(), self.microbatch.tobytes()))

    def __repr__(self) -> str:
        shown = " ".join(str(action) for action in self[:12])
        return f"Order({shown}{' ...' if len(self) > 12 else ''})"


def narrowed(what: str, column: npt.NDArray[Any], largest: int) -> npt.NDArray[Any]:
    """The column, once its numbers are known to fit; a cast alone would wrap larger ones without a word."""
    if column.size and column.dtype.kind not in "iu":
        raise ScheduleError(f"{what} must be whole numbers of 0 to {largest}, got {column.dtype}")
    # Read as if they had no sign, negative numbers are larger than any that is allowed: one comparison tells.
    if column.size and column.view(f"u{column.dtype.itemsize}").max() > largest:
        wrong = column.min() if column.min() < 0 else column.max()
        raise ScheduleError(f"{what} must be 0 to {largest}, got {wrong}")
    return column


def forwards(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """Forwards F, in this sequence.

    Parameters
    ----------
    stage : int, or array of shape (microbatches,)
        The stage of all, or of each.
    microbatches : array or range
        Which microbatches. These parameters are also those of the three functions that follow.

    Examples
    --------
    >>> forwards(2, range(3))
    Order(2F0 2F1 2F2)
    """
    return _run(stage, Kind.F, microbatches)


def backwards(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """Full backwards B, in this sequence."""
    return _run(stage, Kind.B, microbatches)


def backward_inputs(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """Backwards for the input I, in this sequence."""
    return _run(stage, Kind.I, microbatches)


def backward_weights(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """Backwards for the weights W, in this sequence."""
    return _run(stage, Kind.W, microbatches)


def _run(stage: npt.ArrayLike, kind: Kind, microbatches: npt.ArrayLike | range) -> Order:
    """Actions of one kind."""
    if isinstance(microbatches, range):  # NumPy would make a list of it, which for a mistyped length fills the memory
        microbatches = np.arange(microbatches.start, microbatches.stop, microbatches.step)
    microbatch = np.atleast_1d(np.asarray(microbatches))
    if type(stage) is not int or microbatch.ndim != 1:
        return Order(stage, int(kind), microbatches)
    # Most orders have one stage: kinds and pairs need no check then.
    if not 0 <= stage <= LARGEST_NUMBER:
        narrowed("an order's stage", np.asarray([stage]), LARGEST_NUMBER)
    shape = microbatch.shape
    stages, kinds = np.empty(shape, np.int32), np.empty(shape, np.int8)
    stages.fill(stage)
    kinds.fill(kind)
    return Order._of_orders(
        stages,
        kinds,
        narrowed("an order's microbatch", microbatch, LARGEST_NUMBER).astype(np.int32),
        np.zeros(shape, bool),
    )


def concatenate(orders: Sequence[Order]) -> Order:
    """The given orders one after another."""
    if not orders:
        return Order([], [], [], [])
    columns = zip(*(order._columns for order in orders), strict=True)
    return Order._of_orders(*(np.concatenate(column) for column in columns))


def interleave(*orders: Order) -> Order:
    """One action of each order in turn. Raises InputError unless all have the same length; none may hold pairs.

    >>> interleave(forwards(0, range(2)), backwards(1, range(2)))
    Order(0F0 1B0 0F1 1B1)
    """
    lengths = [len(order.stage) for order in orders]
    if len(set(lengths)) > 1:
        raise InputError(f"interleave needs orders of one length, got {' and '.join(map(str, lengths))} actions")
    columns = zip(*(order._columns for order in orders), strict=True)
    return Order(*(np.stack(column, axis=1).reshape(-1) for column in columns))


def overlap(forward: Order, backward: Order) -> Order:
    """Overlapped pairs: each F of `forward` with the B at its place in `backward`. Both have the same length.

    >>> overlap(forwards(0, [3]), backwards(3, [1]))
    Order((0F3;3B1)OVERLAP_F_B)
    """
    parts = interleave(forward, backward)
    return Order(parts.stage, parts.kind, parts.microbatch, np.arange(len(parts.stage)) % 2 == 0)


def in_slots(*runs: tuple[Order, npt.ArrayLike]) -> Order:
    """Orders merged by time slots: what stands in an earlier slot comes first, and in one slot what is given first.

    Parameters
    ----------
    runs : pairs of an order without pairs and an array of shape (parts,)
        The slot of each part, ascending.

    Raises
    ------
    InputError
        If there are not as many slots as parts.

    Examples
    --------
    The second rank of three under 1F1B runs its forwards one slot early:

    ```
    slot  -1  0     1     2
          F0  F1 B0 F2 B1    B2
    ```

    >>> every = np.arange(3)
    >>> in_slots((forwards(1, every), every - 1), (backwards(1, every), every))
    Order(1F0 1F1 1B0 1F2 1B1 1B2)
    """
    together = concatenate([order for order, _ in runs])
    slots = np.concatenate([np.asarray(slots) for _, slots in runs])
    if len(slots) != len(together.stage):
        raise InputError(f"in_slots needs a slot for each part, got {len(slots)} for {len(together.stage)} parts")
    by_slot = np.argsort(slots, kind="stable")
    columns = (together.stage[by_slot], together.kind[by_slot], together.microbatch[by_slot])
    return Order._of_orders(*columns, np.zeros(len(slots), bool))


def first_microbatches(order: Order, microbatches: int) -> Order:
    """The order without the microbatches from number `microbatches` on; what is left of a pair runs alone."""
    kept = order.microbatch < microbatches
    joined = order.joined & np.append(kept[1:], False)
    return Order(order.stage[kept], order.kind[kept], order.microbatch[kept], joined[kept])
