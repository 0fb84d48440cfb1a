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


def many(count: int, *names: str, share: float = 1.0, **others: object) -> int:
    """Takes arguments of every kind."""
    return count + len(names)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((("1",), {}), "count must be a whole number, got '1'"),
        (((1, "a", 2), {}), r"names\[1\] must be text, got 2"),
        (((1, "a"), {"share": "b"}), "share must be a number, got 'b'"),
        (((), {"count": "1"}), "count must be a whole number, got '1'"),
    ],
)
def test_an_argument_is_checked_however_it_is_given(call: tuple[tuple, dict], said: str) -> None:
    with pytest.raises(InputError, match=said):
        checks.checked(many)(*call[0], **call[1])


def test_a_call_that_does_not_fit_is_refused_as_python_does() -> None:
    assert checks.checked(many)(1, "a", "b", share=2, names=3) == 3
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
        checks.checked(many)()
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        checks.checked(first)(["a"], 1)
