"""The fit finds the link that made the data, and gives a link whatever the data."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Link, LinkPiece
from ppsim.network.link_fit import fit_link

SIZES = [64 << power for power in range(19)]
JUMPING = Link(
    latency_s=1e-4,
    gap_s=2e-5,
    larger=(
        LinkPiece(from_bytes=1 << 18, latency_s=1.2e-4, gap_s=8e-5),
        LinkPiece(from_bytes=1 << 20, latency_s=1.5e-4, gap_s=4e-5, bytes_per_s=3.8e9),
    ),
)
LINKS = {
    "latency alone": Link(latency_s=1e-4),
    "latency and bandwidth": Link(latency_s=1e-5, bytes_per_s=25e9),
    "a gap and bandwidth": Link(gap_s=3e-5, bytes_per_s=1e9),
    "three pieces that jump": JUMPING,
    "two that meet": Link(
        latency_s=1e-4, larger=(LinkPiece(from_bytes=100_000, latency_s=5e-5, bytes_per_s=100_000 / 5e-5),)
    ),
}


def measured(link: Link, sizes: list[int] = SIZES) -> tuple[np.ndarray, np.ndarray]:
    return np.array([link.one_way_s(n) for n in sizes]), np.array([link.occupied_s(n) for n in sizes])


def numbers(link: Link) -> tuple[float, float, float]:
    """Of a link with one piece."""
    assert link.larger == ()
    return link.latency_s, link.gap_s, link.bytes_per_s


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_exact_data_gives_the_link_that_made_it(link: Link) -> None:
    found = fit_link(SIZES, *measured(link))
    assert len(found.pieces) == len(link.pieces)
    for size in SIZES:
        assert found.one_way_s(size) == pytest.approx(link.one_way_s(size), rel=2e-3)
        assert found.occupied_s(size) == pytest.approx(link.occupied_s(size), rel=2e-3, abs=2e-3 * link.one_way_s(size))


def test_breaks_are_found_to_the_measured_size_and_meeting_pieces_meet() -> None:
    assert [piece.from_bytes for piece in fit_link(SIZES, *measured(JUMPING)).larger] == [1 << 18, 1 << 20]
    link = LINKS["two that meet"]
    assert fit_link(SIZES, *measured(link)).larger[0].from_bytes == pytest.approx(100_000, rel=0.02)


def test_noise_of_a_tenth_moves_the_link_by_less_and_adds_no_pieces() -> None:
    dice = np.random.default_rng(3)
    one_way, occupied = (t * np.exp(dice.normal(0, 0.1, len(SIZES))) for t in measured(JUMPING))
    found = fit_link(SIZES, one_way, occupied)
    assert len(found.pieces) <= 3
    ratios = [found.one_way_s(size) / JUMPING.one_way_s(size) for size in SIZES]
    assert np.mean(np.abs(np.log(ratios))) < 0.08
    assert found.pieces[-1].bytes_per_s == pytest.approx(3.8e9, rel=0.15)


def test_an_outlier_moves_nothing() -> None:
    link = Link(latency_s=1e-4, gap_s=1e-5, bytes_per_s=4e9)
    one_way, occupied = measured(link)
    one_way[7] *= 5
    found = fit_link(SIZES, one_way, occupied, most_pieces=1)
    assert found.latency_s == pytest.approx(1e-4, rel=0.02)
    assert found.bytes_per_s == pytest.approx(4e9, rel=0.02)


def test_bursts_tell_latency_from_occupation() -> None:
    """The same single messages, once all latency and once all bandwidth."""
    one_way = [1e-3] * 4
    sizes = [1000, 2000, 4000, 8000]
    assert numbers(fit_link(sizes, one_way, [0.0] * 4)) == pytest.approx((1e-3, 0, math.inf))
    assert numbers(fit_link(sizes, one_way, one_way)) == pytest.approx((0, 1e-3, math.inf))


def test_one_size_is_bandwidth_and_latency() -> None:
    assert numbers(fit_link([1000], [3.0], [1.0])) == pytest.approx((2.0, 0, 1000.0))
    assert numbers(fit_link([0, 0], [3.0, 3.0], [1.0, 1.0])) == pytest.approx((2.0, 1.0, math.inf))


@given(st.data())
def test_any_data_gives_a_link_on_which_no_message_is_cheaper_than_a_smaller_one(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 1 << 26), min_size=1, max_size=9))
    seconds = st.floats(1e-6, 1e-1)
    one_way, occupied = (data.draw(st.lists(seconds, min_size=len(sizes), max_size=len(sizes))) for _ in range(2))
    found = fit_link(sizes, one_way, occupied)
    probes = sorted({*sizes, *(p.from_bytes + d for p in found.larger for d in (-1, 0, 1))})
    for smaller, larger in pairwise(probes):
        assert found.one_way_s(smaller) <= found.one_way_s(larger) * (1 + 1e-8)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (([], [], []), "lists of one length, 1 or more"),
        (([1, 2], [1.0], [1.0]), "lists of one length"),
        (([-1], [1.0], [1.0]), r"size_bytes must be finite and >= 0, got .*-1.0"),
        (([1], [0.0], [0.0]), "one_way_s must be finite and > 0"),
        (([1], [1.0], [math.nan]), "occupied_s must be finite and >= 0"),
    ],
)
def test_data_without_meaning_is_refused(lists, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_link(*lists)
    with pytest.raises(ValueError, match="most_pieces must be 1 or more, got 0"):
        fit_link([1], [1.0], [1.0], most_pieces=0)
