"""Grids: the product is itertools', in its order, and costs nothing until it is looked at."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim.parameter_sweep.grid import points_of


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(), max_size=4), max_size=4))
def test_a_product_is_that_of_itertools(axes: dict[str, list[Any]]) -> None:
    expected = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    points = points_of(axes)
    assert list(points) == expected
    assert points[1:] == expected[1:]
    assert [points[-1 - at] for at in range(len(points))] == expected[::-1]


def test_points_may_differ_in_their_names_and_come_from_a_generator() -> None:
    points = points_of({"a": a} if a else {} for a in range(3))
    assert list(points) == [{}, {"a": 1}, {"a": 2}]
    assert points.name_sets == {frozenset(), frozenset({"a"})}


def test_a_huge_product_is_not_held() -> None:
    points = points_of({name: range(1000) for name in "abcd"})
    assert len(points) == 10**12
    assert points[123_456_789_012] == {"a": 123, "b": 456, "c": 789, "d": 12}
    assert points.configuration(-1) == '{"a":999,"b":999,"c":999,"d":999}'
    with pytest.raises(IndexError):
        points[10**12]
