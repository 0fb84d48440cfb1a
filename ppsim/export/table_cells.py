"""Table cells: how values are written in tables, on terminals and in reports alike."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

Table = Sequence[Mapping[str, Any]]

_AMOUNT = re.compile(r"[-+−–]?[\d.,]+(e[-+]?\d+)?\s?(%|×|[nµm]?s|[KMGT]?i?B|[KMGT]?i?B/s)?")


def columns_of(rows: Table) -> dict[str, bool]:
    """The columns of all rows, in order; True for those that hold amounts only, which are right-aligned."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: all(_is_amount(row.get(name)) for row in rows) for name in names}


def cell_text(value: Any) -> str:
    """A value as a table shows it: floats with four significant digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        return f"{number:,.4g}" if abs(number) < 1e4 else f"{number:,.0f}" if abs(number) < 1e9 else f"{number:.4g}"
    return str(value)


def _is_amount(value: Any) -> bool:
    """Whether it is a number, text that is a number with or without a unit, or a missing value."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or _AMOUNT.fullmatch(value.strip()) is not None
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
