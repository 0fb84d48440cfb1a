"""Links: what a message costs, and which pair has which."""

from __future__ import annotations

import math

import pytest

from ppsim import Link, Network


def test_without_arguments_messages_are_free() -> None:
    link = Network().link(0, 1)
    assert link.occupied_s(10**12) == 0
    assert link.latency_s == 0


def test_a_link_is_occupied_by_bytes_and_not_by_latency() -> None:
    assert Link(latency_s=5.0, bytes_per_s=100.0).occupied_s(250) == 2.5


def test_links_are_directed() -> None:
    fast = Link(latency_s=1.0)
    network = Network(latency_s=3.0, bytes_per_s=10.0, links={(0, 1): fast})
    assert network.link(0, 1) == fast
    assert network.link(1, 0) == Link(latency_s=3.0, bytes_per_s=10.0)


@pytest.mark.parametrize("make", [Link, Network])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency_s", -1.0),
        ("latency_s", math.nan),
        ("latency_s", math.inf),
        ("bytes_per_s", 0.0),
        ("bytes_per_s", -1.0),
        ("bytes_per_s", math.nan),
    ],
)
def test_links_without_meaning_are_refused(make: type, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .* got {value}"):
        make(**{field: value})
