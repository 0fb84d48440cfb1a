"""Links: what a message costs, and which pair has which."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, Link, LinkPiece, Network, build_schedule
from ppsim.simulation.timed_program import message_bytes
from tests.support.evaluator import evaluate, spelled
from tests.support.strategies import links, networks, schedules, stage_costs

JUMPING = Link(
    latency_s=1.0,
    larger=(
        LinkPiece(from_bytes=100, latency_s=1.0, gap_s=0.5),
        LinkPiece(from_bytes=1000, latency_s=0.25, gap_s=1.0, bytes_per_s=1000.0),
    ),
)


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


@pytest.mark.parametrize("make", [Link, Network, LinkPiece])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gap_s", -1.0),
        ("gap_s", math.inf),
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


@pytest.mark.parametrize(
    ("size_bytes", "occupied_s", "latency_s"),
    [(0, 0.0, 1.0), (99, 0.0, 1.0), (100, 0.5, 1.0), (999, 0.5, 1.0), (1000, 2.0, 0.25), (5000, 6.0, 0.25)],
)
def test_a_message_costs_what_the_piece_of_its_size_says(size_bytes: int, occupied_s: float, latency_s: float) -> None:
    assert JUMPING.occupied_s(size_bytes) == occupied_s
    assert JUMPING.one_way_s(size_bytes) == occupied_s + latency_s
    occupied, latency = JUMPING.transfer_times(np.array([size_bytes]))
    assert (occupied.tolist(), latency.tolist()) == ([occupied_s], [latency_s])


def test_a_link_is_its_pieces() -> None:
    assert [piece.from_bytes for piece in JUMPING.pieces] == [0, 100, 1000]
    assert Link.of(*JUMPING.pieces) == JUMPING
    with pytest.raises(ValueError, match="the first piece must have from_bytes 0"):
        Link.of(LinkPiece(from_bytes=1))
    with pytest.raises(ValueError, match="the first piece must have from_bytes 0"):
        Link.of()


@pytest.mark.parametrize("make", [Link, Network])
@pytest.mark.parametrize(
    ("larger", "said"),
    [
        ([LinkPiece(from_bytes=0, latency_s=2)], "must ascend in from_bytes, from 1 on, got 0 after 0"),
        ([LinkPiece(from_bytes=9, latency_s=2), LinkPiece(from_bytes=9, latency_s=2)], "got 9 after 9: sort them"),
        ([LinkPiece(from_bytes=9, latency_s=0.5)], "message of 9 bytes would take 0.5 s and one of 8 bytes 1.0 s"),
    ],
)
def test_pieces_without_meaning_are_refused(make: type, larger: list[LinkPiece], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(latency_s=1.0, larger=larger)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None])
def test_a_piece_begins_at_a_whole_size(value: object) -> None:
    with pytest.raises(ValueError, match="from_bytes must be"):
        LinkPiece(from_bytes=value)


_any_piece = st.builds(
    LinkPiece,
    latency_s=st.floats(0, 1),
    gap_s=st.floats(0, 1),
    bytes_per_s=st.floats(1, 1e12) | st.just(math.inf),
)


@st.composite
def any_links(draw: st.DrawFn) -> Link:
    """Up to three pieces, each made dear enough by its gap."""
    pieces = [draw(_any_piece)]
    for size in sorted(draw(st.sets(st.integers(1, 1 << 30), max_size=2))):
        drawn, floor_s = draw(_any_piece), pieces[-1].one_way_s(size)
        pieces.append(
            LinkPiece(
                from_bytes=size,
                latency_s=drawn.latency_s,
                gap_s=drawn.gap_s + floor_s,
                bytes_per_s=drawn.bytes_per_s,
            )
        )
    return Link.of(*pieces)


@given(any_links(), st.lists(st.integers(0, 1 << 31), min_size=1, max_size=20))
def test_all_messages_at_once_cost_the_same_floats_as_one_by_one(link: Link, sizes: list[int]) -> None:
    sizes += [piece.from_bytes + off for piece in link.larger for off in (-1, 0, 1)]
    occupied, latency = link.transfer_times(np.array(sizes))
    assert occupied.tolist() == [link.occupied_s(size) for size in sizes]
    assert latency.tolist() == [link.piece(size).latency_s for size in sizes]
    by_size = [link.one_way_s(size) for size in sorted(sizes)]
    assert all(smaller <= larger * (1 + 1e-8) for smaller, larger in pairwise(by_size))


@given(st.data())
def test_the_network_answers_for_every_message_of_a_program(data: st.DataObject) -> None:
    """Against the evaluator, which finds messages, links and pieces by itself; in fractions."""
    schedule = data.draw(schedules())
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks, most_pieces=3))
    program = schedule.program
    occupied_s, latency_s = network.transfer_times(program, message_bytes(program, costs))
    transfers = evaluate(spelled(schedule), schedule.placement, costs, network).transfers
    found = {}
    for message in range(len(program.messages)):
        rows = program.messages.producer[message], program.messages.consumer[message]
        pair = tuple((a.stage, a.kind.name, a.microbatch) for a in map(program.action_of, rows))
        found[pair] = (occupied_s[message], latency_s[message])
    assert found == {pair: (left - begun, there - left) for pair, (begun, left, there) in transfers.items()}


@given(links(most_pieces=3), st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.integers(0, 200))
def test_a_slowed_link_takes_that_many_times_as_long(link: Link, factor: float, size_bytes: int) -> None:
    slow = link.slowed(factor)
    assert slow.occupied_s(size_bytes) == factor * link.occupied_s(size_bytes)
    assert slow.one_way_s(size_bytes) == factor * link.one_way_s(size_bytes)


def test_stragglers_are_slow_and_the_others_are_not() -> None:
    network = Network(latency_s=1.0, bytes_per_s=10.0, links={(1, 0): JUMPING})
    slow = network.slowed({(0, 1): 3.0, (1, 0): 2.0})
    assert slow.link(0, 1) == Link(latency_s=3.0, bytes_per_s=10.0 / 3)
    assert slow.link(1, 0).one_way_s(5000) == 12.5
    assert slow.link(0, 2) == network.link(0, 2)
    assert network.link(0, 1).latency_s == 1.0
    program = build_schedule("afab", ranks=3, microbatches=2).program
    before, after = (n.transfer_times(program, np.full(len(program.messages), 20)) for n in (network, slow))
    factors = {(0, 1): 3.0, (1, 0): 2.0}
    pairs = zip(program.messages.source.tolist(), program.messages.destination.tolist(), strict=True)
    expected = np.array([factors.get(pair, 1.0) for pair in pairs])
    for one, other in zip(before, after, strict=True):
        assert other == pytest.approx(one * expected)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, "2"])
def test_a_factor_without_meaning_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match=r"slowed by a finite factor > 0|must be a number"):
        Network().slowed({(0, 1): factor})
