"""Host link: a fit gives the link back that made the times, and nothing of what cannot be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import HostLink, InputError


@given(
    latency_s=st.floats(1e-6, 1e-2),
    bytes_per_s=st.floats(1e6, 1e11),
    sizes=st.lists(st.integers(1, 10**9), min_size=2, max_size=6, unique=True),
)
def test_a_fit_gives_the_link_back_that_made_the_times(latency_s: float, bytes_per_s: float, sizes: list[int]) -> None:
    link = HostLink(latency_s=latency_s, bytes_per_s=bytes_per_s)
    fitted = HostLink.fitted(sizes, [link.copy_s(size) for size in sizes])
    assert [fitted.copy_s(size) for size in sizes] == pytest.approx([link.copy_s(size) for size in sizes], rel=1e-6)


def test_copies_of_one_size_are_all_latency() -> None:
    link = HostLink.fitted([64, 64], [0.5, 0.5])
    assert link.bytes_per_s == math.inf
    assert link.latency_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sizes", "seconds", "said"),
    [
        ([], [], "must be lists of one length"),
        ([1, 2], [1.0], "must be lists of one length"),
        ([1], [0.0], "seconds finite and > 0"),
        ([-1], [1.0], "size_bytes must be finite"),
    ],
)
def test_a_fit_of_nothing_is_refused(sizes: list[int], seconds: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        HostLink.fitted(sizes, seconds)
