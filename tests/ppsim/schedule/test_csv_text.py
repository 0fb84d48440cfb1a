"""CSV both ways, with and without communication, against files that PyTorch writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Schedule, ScheduleError, build_schedule, schedule_names
from tests.support.named import built


@given(st.sampled_from(schedule_names()), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_what_is_written_reads_back(name: str, ranks: int, microbatches: int, messages: bool) -> None:
    schedule = built(name, ranks=ranks, microbatches=microbatches)
    text = schedule.to_csv(messages=messages)
    assert Schedule.from_csv(text, name=schedule.name, copies=schedule.copies) == schedule


def test_messages_stand_beside_what_they_serve_and_reductions_after_the_last_backward() -> None:
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "(1F1;1B0)OVERLAP_F_B", "1B1"]])
    assert schedule.to_csv(messages=True).splitlines() == [
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD",
        "1RECV_F0,1F0,1RECV_F1,(1F1;1B0)OVERLAP_F_B,1SEND_B0,1B1,1SEND_B1,1REDUCE_GRAD",
    ]


def test_an_evaluation_reduces_nothing() -> None:
    assert "REDUCE" not in build_schedule("afab", ranks=2, microbatches=2).forward_only().to_csv(messages=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0", "row 2: 1SEND_B0 is missing, which 1B0 needs"),
        ("0SEND_F0,0F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "row 1, column 1: 0SEND_F0 must come after 0F0"),
        ("0F0,0SEND_F0,0B0,0RECV_B0\n1RECV_F0,1F0,1B0,1SEND_B0", "row 1, column 4: 0RECV_B0 must come before 0B0"),
        ("0F0,0SEND_F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0", "row 1, column 3: 0SEND_F0 occurs twice"),
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F1,1RECV_F0,1F0,1F1,1B0,1SEND_B0,1B1,1SEND_B1",
            "row 2, column 1: 1RECV_F1 stands where 1RECV_F0 arrives: order receives as rank 0 sends them",
        ),
        ("0F0,0SEND_F1,0B0\n1F0,1B0", "row 1, column 2: 0SEND_F1 has nothing to carry on rank 0"),
        ("0F0,0REDUCE_GRAD,0B0", "row 1, column 2: 0REDUCE_GRAD comes before the last backward of stage 0"),
        ("0F0,0B0\n1F0,1B0,0RESHARD", "row 2, column 3: 0RESHARD is on rank 1, which does not hold stage 0"),
    ],
)
def test_communication_that_is_not_what_lowering_derives_is_refused(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(text)
    assert said in str(caught.value)


class _Standin:
    """What PyTorch's schedules ask of a stage when they write their orders down."""

    submod = None
    has_backward = True

    def __init__(self, rank: int, ranks: int, index: int, stages: int) -> None:
        self.group_rank, self.group_size, self.group = rank, ranks, None
        self.stage_index, self.num_stages = index, stages
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(stages)}


@pytest.mark.parametrize(
    ("theirs", "ours", "placement"),
    [
        ("ScheduleInterleaved1F1B", "interleaved-1f1b", "loop"),
        ("ScheduleInterleavedZeroBubble", "interleaved-zb", "loop"),
        ("ScheduleZBVZeroBubble", "zb-v", "v"),
        ("ScheduleDualPipeV", "dualpipe-v", "v"),
    ],
)
def test_files_that_pytorch_writes_are_read(theirs: str, ours: str, placement: str, tmp_path: Path) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    ranks, microbatches = 3, 6
    held = (0, ranks) if placement == "loop" else (0, 2 * ranks - 1)
    stages = [_Standin(0, ranks, index, 2 * ranks) for index in held]
    schedule = getattr(schedules, theirs)(stages, microbatches, loss_fn=lambda output, target: output)
    wanted = build_schedule(ours, ranks=ranks, microbatches=microbatches)
    for form in ("compute_only", "compute_comms"):
        path = tmp_path / f"{form}.csv"
        schedule._dump_csv(str(path), format=form)
        assert Schedule.from_csv(path.read_text(), name=ours) == wanted


def older(text: str) -> str:
    """A schedule as PyTorch 2.5 spelled it."""
    return re.sub(r"(?<![\w])(\d+)([BI])(\d+)", lambda m: f"{m[1]}{'BW' if m[2] == 'B' else 'B'}{m[3]}", text)


@pytest.mark.parametrize("name", schedule_names())
def test_the_older_spelling_of_backwards_is_read(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    for text in (schedule.to_csv(), schedule.to_csv(messages=True)):
        again = Schedule.from_csv(older(text), copies=schedule.copies)
        assert again.to_csv() == schedule.to_csv()


def test_one_spelling_is_not_taken_for_the_other() -> None:
    with pytest.raises(ScheduleError, match=r"both I and BW.*spell a whole backward B"):
        Schedule.from_csv("0F0,0F1,0I0,0BW1,0W0\n")


def test_a_byte_order_mark_is_no_part_of_the_first_action() -> None:
    text = build_schedule("1f1b", ranks=2, microbatches=4).to_csv()
    assert Schedule.from_csv("\ufeff" + text).to_csv() == text
