"""Actions are spelled as PyTorch spells them, and nothing else is read as one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ppsim import Action, Kind, OverlappedPair, ScheduleError, parse_action
from ppsim.schedule.action import LARGEST_NUMBER

_numbers = st.integers(0, LARGEST_NUMBER)
_whole_stage = {Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD}
_singles = st.sampled_from(list(Kind)).flatmap(
    lambda kind: st.builds(Action, _numbers, st.just(kind), st.none() if kind in _whole_stage else _numbers)
)
_pairs = st.builds(
    OverlappedPair,
    st.builds(Action, _numbers, st.just(Kind.F), _numbers),
    st.builds(Action, _numbers, st.just(Kind.B), _numbers),
)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2F0", Action(2, Kind.F, 0)),
        ("0B13", Action(0, Kind.B, 13)),
        ("1I2", Action(1, Kind.I, 2)),
        ("1W2", Action(1, Kind.W, 2)),
        ("0SEND_F1", Action(0, Kind.SEND_F, 1)),
        ("3RECV_B7", Action(3, Kind.RECV_B, 7)),
        ("0REDUCE_GRAD", Action(0, Kind.REDUCE_GRAD, None)),
        ("(0F3;3B1)OVERLAP_F_B", OverlappedPair(Action(0, Kind.F, 3), Action(3, Kind.B, 1))),
    ],
)
def test_spelling(text: str, action: Action | OverlappedPair) -> None:
    assert parse_action(text) == action
    assert str(action) == text


@given(_singles | _pairs)
def test_every_action_survives_its_spelling(action: Action | OverlappedPair) -> None:
    assert parse_action(str(action)) == action


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not an action"),
        ("0F0junk", "is not an action"),  # PyTorch's parser is not anchored and reads it as 0F0
        ("junk0F0", "is not an action"),
        ("0F0\n", "is not an action"),
        ("-1F0", "is not an action"),
        ("٣F0", "is not an action"),  # digits of other scripts
        ("0f0", "is not an action"),
        ("0F", "give its microbatch, as in 0F0"),
        ("0REDUCE_GRAD1", "leave its microbatch out"),
        ("(0B0;0F0)OVERLAP_F_B", "overlaps B with F"),
        ("(0F0;0I0)OVERLAP_F_B", "overlaps F with I"),
        ("(0F0;)OVERLAP_F_B", "is not an action"),
        ("(0F0;0B0)", "is not an action"),
        # Cause of a bug: 32 bits wrapped silently, 4294967296F0 was read as 0F0.
        ("4294967296F0", "stage 4294967296 is too large: the largest that can be held is 2147483647"),
        ("0B2147483648", "microbatch 2147483648 is too large"),
        # Cause of a bug: Python refuses to read numbers of more than 4300 digits, in its own words.
        ("9" * 5000 + "F0", "stage 99999999999999999999... is too large"),
    ],
)
def test_what_is_not_an_action_is_refused_with_the_text(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_action(text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=20) | st.text(alphabet="0123456789FBIW_();SENDRCVOLAP", max_size=30))
@example("0F0 ")
def test_text_is_an_action_or_a_schedule_error(text: str) -> None:
    try:
        action = parse_action(text)
    except ScheduleError:
        return
    assert parse_action(str(action)) == action


def test_four_kinds_compute() -> None:
    assert [kind for kind in Kind if kind.computes] == [Kind.F, Kind.B, Kind.I, Kind.W, Kind.R]
