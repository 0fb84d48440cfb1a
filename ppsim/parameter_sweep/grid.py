"""Grid: the points of a sweep, in order, with the canonical JSON of each; a product is never held as a whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from ppsim.errors import InputError
from ppsim.parameter_sweep.key import canonical_json

Point = Mapping[str, Any]


class Product(Sequence[Point]):
    """All combinations of the axes' values. The last axis changes fastest.

    Parameters
    ----------
    axes : mapping from name to values
    """

    def __init__(self, axes: Mapping[str, Iterable[Any]]) -> None:
        self._names = list(axes)
        self._values = [_axis(name, values) for name, values in axes.items()]
        self._texts = [
            [_named(name, value) for value in values] for name, values in zip(self._names, self._values, strict=True)
        ]
        # Canonical JSON has its names sorted as JSON text is read, whatever the order of the axes.
        self._sorted = sorted(range(len(self._names)), key=lambda axis: self._names[axis])
        self._length = math.prod(len(values) for values in self._values)

    @property
    def name_sets(self) -> set[frozenset[str]]:
        """The sets of names that points have."""
        return {frozenset(self._names)}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | Sequence[Point]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._length))]
        picked = self._digits(index)
        return {name: values[at] for name, values, at in zip(self._names, self._values, picked, strict=True)}

    def configuration(self, index: int) -> str:
        """The canonical JSON of a point."""
        picked = self._digits(index)
        return "{" + ",".join(self._texts[axis][picked[axis]] for axis in self._sorted) + "}"

    def _digits(self, index: int) -> list[int]:
        """The position on each axis."""
        if not -self._length <= index < self._length:
            raise IndexError(f"point {index} of {self._length}")
        index %= self._length
        digits = []
        for values in reversed(self._values):
            index, digit = divmod(index, len(values))
            digits.append(digit)
        return digits[::-1]


class Listed(Sequence[Point]):
    """Points given one by one.

    Parameters
    ----------
    points : iterable of mappings from name to value
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self._points: list[dict[str, Any]] = []
        self._texts: list[str] = []
        for number, point in enumerate(points):
            if not isinstance(point, Mapping):
                raise InputError(f"point {number} of the grid must be a mapping name -> value, got {point!r:.100}")
            texts = [_named(name, point[name]) for name in sorted(map(_checked_name, point))]
            self._points.append(dict(point))
            self._texts.append("{" + ",".join(texts) + "}")

    @property
    def name_sets(self) -> set[frozenset[str]]:
        """The sets of names that points have."""
        return {frozenset(point) for point in self._points}

    def __len__(self) -> int:
        return len(self._points)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | Sequence[Point]:
        return dict(self._points[index]) if isinstance(index, int) else self._points[index]

    def configuration(self, index: int) -> str:
        """The canonical JSON of a point."""
        return self._texts[index]


def points_of(grid: Mapping[str, Iterable[Any]] | Iterable[Point]) -> Product | Listed:
    """The points of a grid.

    Parameters
    ----------
    grid : mapping or iterable of mappings
        As of `ppsim.sweep`: a mapping name -> values stands for all combinations, other iterables list the points.

    Raises
    ------
    InputError
        For values without a canonical form, names that are no text and axes that are no lists.

    Examples
    --------
    >>> list(points_of({"ranks": [2, 4], "microbatches": [8]}))
    [{'ranks': 2, 'microbatches': 8}, {'ranks': 4, 'microbatches': 8}]
    """
    if isinstance(grid, Mapping):
        return Product(grid)
    if isinstance(grid, (str, bytes)) or not isinstance(grid, Iterable):
        raise InputError(f"a grid is a mapping name -> values or an iterable of points, got {grid!r:.100}")
    return Listed(grid)


def _axis(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InputError(
            f"the grid's {name!r} must be a sequence of values, got {values!r:.100}: write [value] for one"
        )
    return list(values)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f"names in a grid are the function's arguments, text, got {name!r:.100}")
    return name


def _named(name: str, value: Any) -> str:
    try:
        return f"{json.dumps(_checked_name(name))}:{canonical_json(value)}"
    except ValueError as error:
        raise InputError(f"the grid's {name!r}: {error}") from None
