"""DualPipe and Chimera against what their authors publish, drawn, counted and in closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, Kind, OverlappedPair, Schedule, StageCost, build_schedule, simulate
from ppsim.export.staircase import staircase, unit_trace
from ppsim.schedule.named import both_ways
from tests.support.named import BOTH_WAYS

EVEN = st.integers(1, 5).map(lambda half: 2 * half)


def docstring_drawing(function) -> list[str]:
    """The lines between the docstring's fences."""
    lines = function.__doc__.split("```")[1].strip("\n").splitlines()
    return [line.removeprefix("    ") for line in lines if line.strip()]


@pytest.mark.parametrize(("name", "microbatches"), [("dualpipe", 8), ("chimera", 4)])
def test_they_are_as_drawn(name: str, microbatches: int) -> None:
    trace = unit_trace(build_schedule(name, ranks=4, microbatches=microbatches))
    assert staircase(trace).splitlines() == docstring_drawing(getattr(both_ways, name))


@given(st.sampled_from(BOTH_WAYS), EVEN, st.integers(1, 20).map(lambda half: 2 * half))
def test_both_directions_are_mirror_images(name: str, ranks: int, microbatches: int) -> None:
    """Rank r and its mirror do the same with the copies exchanged, and so with the k-th microbatch of each copy."""
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
    number = [np.flatnonzero(schedule.routes == copy).tolist() for copy in (0, 1)]
    place = {microbatch: k for of_copy in number for k, microbatch in enumerate(of_copy)}

    def seen(rank: int, *, mirrored: bool) -> list[tuple[int, int, int, int, bool]]:
        order = schedule.orders[rank]
        columns = (order.stage, order.kind, order.microbatch, order.joined)
        return [
            (stage % ranks, (stage // ranks) ^ mirrored, kind, place[microbatch], joined)
            for stage, kind, microbatch, joined in zip(*(column.tolist() for column in columns), strict=True)
        ]

    if name == "chimera" and (microbatches % ranks) % 2:
        return
    for rank in range(ranks // 2):
        here, there = seen(rank, mirrored=False), seen(ranks - 1 - rank, mirrored=True)
        if name == "dualpipe":
            assert here == there
        else:  # of two in one slot the forward stands first in both, whichever direction it is of
            assert sorted(here) == sorted(there)


@given(st.sampled_from(BOTH_WAYS), EVEN, st.integers(2, 40))
def test_every_rank_holds_two_stages_and_computes_every_microbatch_once(
    name: str, ranks: int, microbatches: int
) -> None:
    if name == "dualpipe":
        microbatches += microbatches % 2
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
    schedule.check()
    assert schedule.copies == 2
    assert all(schedule.stages_of(rank) == (rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    for order in schedule.orders:
        assert sorted(order.microbatch[order.kind == Kind.F].tolist()) == list(range(microbatches))
    halves = np.bincount(schedule.routes)
    assert halves[0] - halves[1] in (0, 1) or name == "chimera"


# DualPipe


def steps_by_hand(rank: int, ranks: int, microbatches: int) -> list[str]:
    """The published procedure, one action after the other: 0 is the direction of the end that the rank is nearer to.

    It is written from the authors' eight steps: nF0, nF0F1, nB1W1F1, nF0B1F1B0, nB1F1B0, nB1B0, nWB0, nW.
    """
    near, half = min(rank, ranks - 1 - rank), ranks // 2
    is_back = rank >= half
    stage = [2 * ranks - 1 - rank, rank] if is_back else [rank, 2 * ranks - 1 - rank]
    first = [microbatches // 2, 0] if is_back else [0, microbatches // 2]
    forward, backward = [itertools.count(first[0]), itertools.count(first[1])], None
    backward = [itertools.count(first[0]), itertools.count(first[1])]
    pending: list[str] = []
    done: list[str] = []

    def f(way: int) -> str:
        return f"{stage[way]}F{next(forward[way])}"

    def b(way: int) -> str:
        return f"{stage[way]}B{next(backward[way])}"

    def split(way: int) -> None:
        number = next(backward[way])
        done.append(f"{stage[way]}I{number}")
        pending.append(f"{stage[way]}W{number}")

    def pair(ahead: int, back: int) -> None:
        done.append(f"({f(ahead)};{b(back)})OVERLAP_F_B")

    for _ in range(2 * (half - near - 1)):  # 1
        done.append(f(0))
    for _ in range(near + 1):  # 2
        done.extend([f(0), f(1)])
    for _ in range(half - near - 1):  # 3
        split(1)
        done.append(pending.pop(0))
        done.append(f(1))
    for turn in range(microbatches // 2 - ranks + near + 1):  # 4
        if turn == 0 and near == half - 1:  # in the middle the first is not overlapped
            done.extend([f(0), b(1)])
        else:
            pair(0, 1)
        pair(1, 0)
    for _ in range(half - near - 1):  # 5
        done.append(b(1))
        pair(1, 0)
    splits = False
    for turn in range(near + 1):  # 6
        if turn == (near + 1) // 2 and near % 2 == 1:
            splits = True
        split(1) if splits else done.append(b(1))
        if turn == (near + 1) // 2 and near % 2 == 0:
            splits = True
        split(0) if splits else done.append(b(0))
    for _ in range(half - near - 1):  # 7
        done.append(pending.pop(0))
        split(0)
    done.extend(pending)  # 8
    return done


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 16])
def test_dualpipe_is_the_published_procedure(ranks: int) -> None:
    for microbatches in (2 * ranks, 2 * ranks + 2, 3 * ranks, 20 + 2 * ranks):
        schedule = build_schedule("dualpipe", ranks=ranks, microbatches=microbatches)
        for rank, order in enumerate(schedule.orders):
            assert [str(action) for action in order] == steps_by_hand(rank, ranks, microbatches)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_fewer_microbatches_than_the_authors_allow_are_the_start_of_more(ranks: int) -> None:
    whole = build_schedule("dualpipe", ranks=ranks, microbatches=2 * ranks)
    for half in range(1, ranks):
        part = build_schedule("dualpipe", ranks=ranks, microbatches=2 * half)
        for few, many in zip(part.orders, whole.orders, strict=True):
            kept = many.take(many.microbatch % ranks < half)
            assert (few.stage.tolist(), few.kind.tolist()) == (kept.stage.tolist(), kept.kind.tolist())
            assert (few.microbatch % half).tolist() == (kept.microbatch % ranks).tolist()


def test_pairs_are_of_opposite_directions() -> None:
    schedule = build_schedule("dualpipe", ranks=8, microbatches=20)
    pairs = [action for order in schedule.orders for action in order if isinstance(action, OverlappedPair)]
    assert len(pairs) > 8 * 10
    assert all((pair.forward.stage < 8) != (pair.backward.stage < 8) for pair in pairs)


# Chimera


def figure_3() -> list[list[str]]:
    """Four stages and four microbatches as in the paper's figure: microbatch and direction, F and B one slot each."""
    return [
        ["0F0", "0F1", "7F2", "7B2", "7F3", "7B3", "0B0", "0B1"],
        ["1F0", "6F2", "1F1", "6F3", "6B2", "1B0", "6B3", "1B1"],
        ["5F2", "2F0", "5F3", "2F1", "2B0", "5B2", "2B1", "5B3"],
        ["4F2", "4F3", "3F0", "3B0", "3F1", "3B1", "4B2", "4B3"],
    ]


def test_chimera_is_as_in_the_papers_figure() -> None:
    schedule = build_schedule("chimera", ranks=4, microbatches=4)
    assert schedule.orders == Schedule.of(figure_3(), copies=2).orders


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("units", [1, 2, 5])
def test_chimera_s_directions_are_each_1f1b(ranks: int, units: int) -> None:
    """Of each direction alone a unit is 1F1B of p stages and p / 2 microbatches."""
    schedule = build_schedule("chimera", ranks=ranks, microbatches=units * ranks)
    one_way = build_schedule("1f1b", ranks=ranks, microbatches=ranks // 2)
    for rank, order in enumerate(schedule.orders):
        for copy, stage in enumerate((rank, ranks - 1 - rank)):
            own = order.take((order.stage == stage + copy * ranks) & (order.microbatch < ranks))
            plain = one_way.orders[stage]
            assert own.kind.tolist() == plain.kind.tolist()
            assert own.microbatch.tolist() == (plain.microbatch + copy * ranks // 2).tolist()


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_where_forwards_and_backwards_take_equally_long_a_rank_idles_p_minus_2_slots(ranks: int) -> None:
    cost = StageCost(forward_s=1, backward_input_s=0.5, backward_weight_s=0.5)
    for units in (1, 2, 3, 7):
        trace = simulate(build_schedule("chimera", ranks=ranks, microbatches=units * ranks), [cost] * ranks)
        assert trace.bubble_s.tolist() == [ranks - 2] * ranks


# Refused


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize(("ranks", "near"), [(1, "take 2"), (3, "take 2 or 4"), (7, "take 6 or 8")])
def test_odd_ranks_are_refused(name: str, ranks: int, near: str) -> None:
    with pytest.raises(InputError, match=f"{name} needs an even number of ranks.*got {ranks}: {near}"):
        build_schedule(name, ranks=ranks, microbatches=8)


def test_dualpipe_refuses_an_odd_number_of_microbatches() -> None:
    with pytest.raises(InputError, match="dualpipe needs as many microbatches from each end, got 7: take 6 or 8"):
        build_schedule("dualpipe", ranks=4, microbatches=7)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_one_microbatch_has_no_second_direction(name: str) -> None:
    with pytest.raises(InputError, match="got 1: take 2"):
        build_schedule(name, ranks=4, microbatches=1)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_other_numbers_of_stages_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="has 2 stage"):
        build_schedule(name, ranks=4, microbatches=8, stages_per_rank=4)
