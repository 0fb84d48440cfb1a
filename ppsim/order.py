"""Order: what one rank computes, in sequence, held as integer arrays and shown as Actions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ppsim.action import Action, Kind, OverlappedPair, parse_action
from ppsim.errors import ScheduleError

Integers = npt.NDArray[np.integer]


class Order(Sequence[Action | OverlappedPair]):
    """A rank's compute actions. Immutable; eight million actions take 80 MB, not gigabytes.

    Every part of an action is one entry of the arrays: `stage`, `kind`, `microbatch`. An overlapped pair is two
    entries, its forward first, of which the first has `joined` set. So `len(order)` counts actions and
    `len(order.stage)` counts parts.

    Orders are written by adding runs: `forwards(0, range(4)) + backwards(0, range(4))`.
    """

    __slots__ = ("_starts", "joined", "kind", "microbatch", "stage")

    def __init__(
        self, stage: npt.ArrayLike, kind: npt.ArrayLike, microbatch: npt.ArrayLike, joined: npt.ArrayLike = False
    ) -> None:
        given = (np.atleast_1d(np.asarray(column)) for column in (stage, kind, microbatch, joined))
        columns = np.broadcast_arrays(*given)
        self.stage = columns[0].astype(np.int32)
        self.kind = columns[1].astype(np.int8)
        self.microbatch = columns[2].astype(np.int32)
        self.joined = columns[3].astype(bool)
        for name in ("stage", "kind", "microbatch", "joined"):
            getattr(self, name).flags.writeable = False
        self._starts: Integers | None = None

    @classmethod
    def of(cls, actions: Iterable[Action | OverlappedPair | str]) -> Order:
        """An order from actions or their spellings, e.g. `Order.of(["0F0", "0B0"])`."""
        rows: list[tuple[int, int, int, bool]] = []
        for entry in actions:
            action = parse_action(entry) if isinstance(entry, str) else entry
            parts = tuple(action) if isinstance(action, OverlappedPair) else (action,)
            for part in parts:
                if not part.kind.computes or part.microbatch is None:
                    raise ScheduleError(
                        f"{part} does not compute: an order holds F, B, I, W and overlapped pairs; messages follow "
                        "from it and are added by lowering"
                    )
                rows.append((part.stage, int(part.kind), part.microbatch, len(parts) == 2 and part is parts[0]))
        if not rows:
            return cls([], [], [], [])
        return cls(*zip(*rows, strict=True))

    @property
    def starts(self) -> Integers:
        """The first part of each action, shape (actions,)."""
        if self._starts is None:
            follows = np.zeros(len(self.joined), bool)
            follows[1:] = self.joined[:-1]
            self._starts = np.flatnonzero(~follows)
        return self._starts

    def take(self, parts: npt.ArrayLike) -> Order:
        """The given parts (indices or a mask), pairs dissolved, in their sequence here."""
        index = np.asarray(parts)
        return Order(self.stage[index], self.kind[index], self.microbatch[index], False)

    def __len__(self) -> int:
        return len(self.starts)

    def _action_at(self, part: int) -> Action | OverlappedPair:
        first = Action(int(self.stage[part]), Kind(int(self.kind[part])), int(self.microbatch[part]))
        if not self.joined[part]:
            return first
        second = Action(int(self.stage[part + 1]), Kind(int(self.kind[part + 1])), int(self.microbatch[part + 1]))
        return OverlappedPair(first, second)

    def __getitem__(self, index):
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
            return all(
                np.array_equal(getattr(self, name), getattr(other, name))
                for name in ("stage", "kind", "microbatch", "joined")
            )
        if isinstance(other, Sequence) and not isinstance(other, str):
            return list(self) == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.stage.tobytes(), self.kind.tobytes(), self.microbatch.tobytes()))

    def __repr__(self) -> str:
        shown = " ".join(str(action) for action in self[:12])
        return f"Order({shown}{' ...' if len(self) > 12 else ''})"


def forwards(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """F of the given microbatches, in that sequence; `stage` is one number or one per microbatch."""
    return _run(stage, Kind.F, microbatches)


def backwards(stage: npt.ArrayLike, microbatches: npt.ArrayLike | range) -> Order:
    """Full backwards B, in that sequence."""
    return _run(stage, Kind.B, microbatches)


def _run(stage: npt.ArrayLike, kind: Kind, microbatches: npt.ArrayLike | range) -> Order:
    return Order(stage, int(kind), np.asarray(microbatches, dtype=np.int32))


def concatenate(orders: Sequence[Order]) -> Order:
    """The given orders one after another."""
    if not orders:
        return Order([], [], [], [])
    return Order(
        *(
            np.concatenate([getattr(order, name) for order in orders])
            for name in ("stage", "kind", "microbatch", "joined")
        )
    )


def interleave(first: Order, second: Order) -> Order:
    """One part of `first`, one of `second`, and so on; both must have the same length and hold no pairs."""
    if len(first.stage) != len(second.stage):
        raise ValueError(f"interleave needs orders of one length, got {len(first.stage)} and {len(second.stage)}")
    return Order(
        *(
            np.stack([getattr(first, name), getattr(second, name)], axis=1).reshape(-1)
            for name in ("stage", "kind", "microbatch", "joined")
        )
    )
