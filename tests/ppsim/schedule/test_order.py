"""Orders are arrays that look like sequences of actions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Action, Kind, Order, OverlappedPair, ScheduleError
from ppsim.schedule.order import backwards, concatenate, forwards, interleave

_numbers = st.integers(0, 2**31 - 1)
_actions = st.builds(Action, _numbers, st.sampled_from([Kind.F, Kind.B, Kind.I, Kind.W]), _numbers)
_pairs = st.builds(
    OverlappedPair,
    st.builds(Action, _numbers, st.just(Kind.F), _numbers),
    st.builds(Action, _numbers, st.just(Kind.B), _numbers),
)
_sequences = st.lists(_actions | _pairs, max_size=12)


@given(_sequences)
def test_an_order_is_the_sequence_it_was_made_of(actions: list[Action | OverlappedPair]) -> None:
    order = Order.of(actions)
    assert list(order) == actions
    assert len(order) == len(actions)
    assert [order[k] for k in range(len(order))] == actions
    assert order[1:] == actions[1:]
    assert order == actions
    assert Order.of(str(action) for action in actions) == order


@given(_sequences, _sequences)
def test_adding_is_one_after_another(first: list[Action], second: list[Action]) -> None:
    total = Order.of(first) + Order.of(second)
    assert list(total) == first + second
    assert total == concatenate([Order.of(first), Order.of(second)])


@given(_sequences, _sequences)
def test_equal_orders_have_equal_hashes(first: list[Action], second: list[Action]) -> None:
    assert (Order.of(first) == Order.of(second)) == (first == second)
    if first == second:
        assert hash(Order.of(first)) == hash(Order.of(second))


@given(_sequences)
def test_take_dissolves_pairs(actions: list[Action | OverlappedPair]) -> None:
    order = Order.of(actions)
    single = [part for entry in actions for part in (entry if isinstance(entry, OverlappedPair) else (entry,))]
    assert list(order.take(order.kind == Kind.F)) == [part for part in single if part.kind == Kind.F]


def test_runs() -> None:
    assert [str(a) for a in forwards(1, range(3)) + backwards(1, [2, 0])] == ["1F0", "1F1", "1F2", "1B2", "1B0"]
    assert [str(a) for a in forwards([0, 2], [5, 5])] == ["0F5", "2F5"]
    assert [str(a) for a in interleave(forwards(0, range(2)), backwards(0, range(2)))] == ["0F0", "0B0", "0F1", "0B1"]


def test_interleave_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        interleave(forwards(0, range(1)), backwards(0, range(2)))


def test_an_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        forwards(0, range(2)).stage[0] = 1


def test_messages_are_no_part_of_an_order() -> None:
    with pytest.raises(ScheduleError, match="0SEND_F1 does not compute"):
        Order.of(["0F0", "0SEND_F1"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        # Cause of a bug: narrowing to 32 bits wrapped silently, so stage 2**32 became stage 0.
        (([2**32], [0], [0]), "stage must be 0 to 2147483647, got 4294967296"),
        (([2**70], [0], [0]), "stage must be whole numbers"),
        (([0], [0], [2**31]), "microbatch must be 0 to 2147483647, got 2147483648"),
        (([0], [0], [-1]), "microbatch must be 0 to 2147483647, got -1"),
        (([0.5], [0], [0]), "stage must be whole numbers"),
        # Cause of a bug: a kind that does not compute was left out of the completeness check.
        (([0], [int(Kind.SEND_F)], [0]), "kind must be F, B, I, W or R, got SEND_F, which does not compute"),
        # Cause of a bug: a first half without a second was an IndexError later.
        (([0], [0], [0], [True]), "part 0 is joined to the next"),
        (([0, 0], [0, 0], [0, 1], [True, False]), "a pair is an F and then a B"),
        (([0, 0, 0], [0, 1, 1], [0, 1, 2], [True, True, False]), "is joined to the next"),
    ],
)
def test_columns_without_meaning_are_refused(columns: tuple, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Order(*columns)
    assert said in str(caught.value)


def test_eight_million_actions_take_eighty_megabytes() -> None:
    order = forwards(0, range(1000))
    columns = (order.stage, order.kind, order.microbatch, order.joined)
    assert sum(column.nbytes for column in columns) == 10 * len(order)
    assert all(isinstance(column, np.ndarray) for column in columns)
