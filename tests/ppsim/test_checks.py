"""Checks: what an annotation asks, whichever way it is written."""

from __future__ import annotations

import pytest
from typing_extensions import TypeAliasType

from ppsim import checks
from ppsim.errors import InputError

Names = TypeAliasType("Names", list[str])
Arrays = TypeAliasType("Arrays", int | list[int])


def first(names: Names | None) -> None:
    """Takes what a `type` statement names."""


def second(method: str | list[int], values: Arrays | None) -> None:
    """Takes an array, as `numpy.typing.ArrayLike` is written from NumPy 2.5 on."""


def test_a_type_statement_is_what_it_names() -> None:
    checks.checked(first)(["a"])
    with pytest.raises(InputError, match=r"names\[1\] must be text, got 2"):
        checks.checked(first)(["a", 2])  # type: ignore[list-item]


def test_array_like_as_the_name_of_a_union(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy 2.5 every union counted as an array: a cut by name, "even", was refused."""
    monkeypatch.setattr(checks, "_ARRAY_LIKE", frozenset([Arrays]))
    checks.checked(second)("even", [1, 2])
    with pytest.raises(InputError, match="values must be a number or an array of numbers, got 'even'"):
        checks.checked(second)("even", "even")  # type: ignore[arg-type]
