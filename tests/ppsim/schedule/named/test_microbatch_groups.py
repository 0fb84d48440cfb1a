"""Rounds of a chosen size, against the counting that Megatron-LM's interleaved runtime does."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ppsim import InputError, StageCost, build_schedule, simulate


def counted(rank: int, ranks: int, microbatches: int, v: int, group: int, *, more: int = 0) -> list[str]:
    """One rank's actions, step by step: forwards of the warm-up, one of each in turn, and what is left of backwards.

    The k-th forward is of the k-th entry of (round, chunk, microbatch), ascending; the k-th backward takes the same
    microbatch and the chunk counted from the other end. more: forwards ahead beyond Megatron's own number.
    """
    entries = sorted((b // group, chunk, b) for b in range(microbatches) for chunk in range(v))
    forward = [f"{chunk * ranks + rank}F{b}" for _, chunk, b in entries]
    backward = [f"{(v - 1 - chunk) * ranks + rank}B{b}" for _, chunk, b in entries]
    warm_up = min((ranks - rank - 1) * 2 + (v - 1) * group + more, len(forward))
    left = len(forward) - warm_up
    steady = [action for k in range(left) for action in (forward[warm_up + k], backward[k])]
    return [*forward[:warm_up], *steady, *backward[left:]]


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int, int, int]:
    ranks, v = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    group = draw(st.integers(ranks, 2 * ranks + 3))
    microbatches = draw(st.integers(1, 30))
    assume(microbatches <= group or microbatches % group == 0 or microbatches % group >= ranks)
    return ranks, microbatches, v, group


@given(groups())
def test_orders_are_those_that_counting_gives(numbers: tuple[int, int, int, int]) -> None:
    ranks, microbatches, v, group = numbers
    schedule = build_schedule(
        "interleaved-1f1b", ranks=ranks, microbatches=microbatches, stages_per_rank=v, microbatch_group=group
    )
    schedule.check()
    # Where all is warm-up, Megatron's counting is of the group as given, and the round is as small as there are.
    size = min(group, microbatches)
    for rank, order in enumerate(schedule.orders):
        assert [str(action) for action in order] == counted(rank, ranks, microbatches, v, size)


@given(groups(), st.sampled_from(["interleaved-1f1b-overlap", "interleaved-zb"]))
def test_other_interleaved_schedules_have_rounds_too(numbers: tuple[int, int, int, int], name: str) -> None:
    ranks, microbatches, v, group = numbers
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=v, microbatch_group=group)
    schedule.check()
    if microbatches % ranks == 0:
        plain, same = (
            build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=v, microbatch_group=size)
            for size in (None, ranks)
        )
        assert plain == same


def test_larger_rounds_hold_more() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1)
    peaks = [
        simulate(
            build_schedule("interleaved-1f1b", ranks=4, microbatches=16, microbatch_group=group), [cost] * 8
        ).peak_activation_bytes[0]
        for group in (4, 8, 16)
    ]
    assert peaks == [11, 15, 23]  # (v - 1) group + 2 (p - 1) + 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("1f1b", {"microbatch_group": 4}, "1f1b has no rounds of microbatches: leave microbatch_group out"),
        ("interleaved-1f1b", {"microbatch_group": 3}, "microbatch_group 3 is below 4 ranks"),
        ("interleaved-1f1b", {"microbatch_group": 7}, "leaves a last round of 1 of 8 microbatches"),
        ("interleaved-1f1b", {"microbatch_group": 0}, "microbatch_group must be a whole number of 1 or more"),
    ],
)
def test_rounds_that_cannot_be_are_refused(name: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError) as caught:
        build_schedule(name, ranks=4, microbatches=8, **options)
    assert said in str(caught.value)
