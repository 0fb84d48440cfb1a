"""Units: seconds and bytes in the unit that suits their size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit to show amounts in: `amount * scale` has the unit `name`. The amount is in seconds or in bytes."""

    name: str
    scale: float

    def text(self, amount: float) -> str:
        """The amount with its unit, to four significant digits: `12.35 ms`."""
        return f"{amount * self.scale:.4g} {self.name}"


_TIMES = tuple(Unit(name=name, scale=scale) for name, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)))
_SIZES = tuple(Unit(name=name, scale=1024.0**-power) for power, name in enumerate(("B", "KiB", "MiB", "GiB", "TiB")))


def time_unit(longest_s: float) -> Unit:
    """s, ms or µs: the largest in which `longest_s` is 1 or more; µs below that, s for 0."""
    if longest_s <= 0:
        return _TIMES[0]
    return next((unit for unit in _TIMES if longest_s * unit.scale >= 1), _TIMES[-1])


def bytes_unit(largest_bytes: float) -> Unit:
    """B, KiB, MiB, GiB or TiB: the largest in which `largest_bytes` is 1 or more; B below that."""
    return next((unit for unit in reversed(_SIZES) if largest_bytes * unit.scale >= 1), _SIZES[0])


def bytes_text(amount_bytes: float) -> str:
    """Bytes in the unit that suits them: `1.5 MiB`."""
    return bytes_unit(amount_bytes).text(amount_bytes)
