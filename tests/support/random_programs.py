"""Random programs: any schedule that can end, and whoever chooses what a machine does next."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import strategies as st

import ppsim
from ppsim import Schedule
from tests.support.nccl_hosts import ALL_REDUCE, COMPUTE, RECEIVE, SEND
from tests.support.nccl_machine import Choose, Move
from tests.support.strategies import schedules

_MOVES = ("end", "submit", COMPUTE, SEND, RECEIVE, ALL_REDUCE)


@st.composite
def named(draw: st.DrawFn) -> Schedule:
    """A schedule by name with random numbers; those that it does not allow are replaced by its own or by AFAB."""
    name = draw(st.sampled_from(ppsim.schedule_names()))
    ranks, microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    for stages_per_rank in (draw(st.integers(1, 3)), None):
        try:
            return ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank)
        except ValueError:
            continue
    return ppsim.build_schedule("afab", ranks=ranks, microbatches=microbatches)


@st.composite
def valid_schedules(draw: st.DrawFn) -> Schedule:
    """By name or in a random valid order, with random placement; some are evaluations."""
    schedule = draw(named() | schedules(max_ranks=5))
    return schedule.forward_only() if draw(st.integers(0, 7)) == 0 else schedule


@st.composite
def adversaries(draw: st.DrawFn) -> Choose:
    """Chooses among possible moves by a random preference for what kind they are, and among equals at random."""
    rank_of = dict(zip(_MOVES, draw(st.tuples(*[st.integers(0, 3)] * len(_MOVES))), strict=True))
    dice = random.Random(draw(st.integers(0, 2**32)))

    def choose(moves: Sequence[Move]) -> Move:
        liked = [rank_of[move.kernels[0].kind if move.what == "start" else move.what] for move in moves]
        best = min(liked)
        return dice.choice([move for move, rank in zip(moves, liked, strict=True) if rank == best])

    return choose


def preferring(*kinds: str) -> Choose:
    """Starts kernels of the first kind before those of the next; all hosts submit first."""
    order = {kind: place for place, kind in enumerate(("submit", *kinds))}

    def choose(moves: Sequence[Move]) -> Move:
        return min(
            moves, key=lambda move: order.get(move.kernels[0].kind if move.what == "start" else move.what, len(order))
        )

    return choose
