"""Divisors: the nearest numbers that divide, for remedies and defaults."""

from __future__ import annotations

from math import isqrt


def largest_divisor(value: int, *, most: int) -> int:
    """The largest number up to `most` that divides `value`."""
    small = [number for number in range(1, isqrt(value) + 1) if value % number == 0]
    return max(each for number in small for each in (number, value // number) if each <= most)
