"""Shown: how values are drawn and shown by code that stands above theirs.

A `Trace` has `plot()`, but figures are made from traces, and not the other way round. So `ppsim` hands in, once, what
draws each kind of value; a method asks for it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ways: dict[str, Callable[..., Any]] = {}


def show_with(**ways: Callable[..., Any]) -> None:
    """Hand in functions by the name under which methods ask for them."""
    _ways.update(ways)


def shown_by(way: str, *args: Any, **options: Any) -> Any:
    """What the function of that name makes of a value."""
    return _ways[way](*args, **options)
