"""Schedules drawn as text."""

from __future__ import annotations

import pytest

from ppsim import Schedule, build_schedule
from ppsim.export.staircase import staircase, unit_trace

_AFAB = """\
rank 0  F0 F1 F2  .  .  .  .  .  . B0 B0 B1 B1 B2 B2
rank 1     F0 F1 F2  .  .  . B0 B0 B1 B1 B2 B2
rank 2        F0 F1 F2 B0 B0 B1 B1 B2 B2"""

_EAGER = """\
rank 0  F0 F1 F2  . B0 B0  . B1 B1  . B2 B2
rank 1     F0 B0 B0 F1 B1 B1 F2 B2 B2"""


def _drawn(schedule: Schedule) -> str:
    return staircase(unit_trace(schedule))


def test_afab() -> None:
    assert _drawn(build_schedule("afab", ranks=3, microbatches=3)) == _AFAB


def test_afab_eager() -> None:
    assert _drawn(build_schedule("afab-eager", ranks=2, microbatches=3)) == _EAGER


def test_several_stages_on_a_rank_are_told_apart() -> None:
    rank_0 = ["0F0", "0F1", "3F0", "3F1", "3I0", "3W0", "3I1", "3W1", "0B0", "0B1"]
    rank_1 = ["1F0", "1F1", "2F0", "2F1", "2B0", "2B1", "1B0", "1B1"]
    lines = _drawn(Schedule.of([rank_0, rank_1])).splitlines()
    assert lines[0].startswith("rank 0  0F0 0F1   .   . 3F0 3F1 3I0 3W0")
    assert [len(line) - len(line.lstrip()) for line in (line[len("rank 0") :] for line in lines)] == [2, 6]


def test_an_overlapped_pair_is_its_forward_and_then_its_backward() -> None:
    assert _drawn(Schedule.of([["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"]])) == "rank 0  F0 F1 B0 B0 B1 B1"


@pytest.mark.parametrize("ranks", [1, 11])
def test_ranks_stand_one_under_the_other(ranks: int) -> None:
    lines = _drawn(build_schedule("afab", ranks=ranks, microbatches=1)).splitlines()
    assert len(lines) == ranks
    assert lines[0].index("F0") == len(f"rank {ranks - 1}") + 2


def test_a_rank_without_actions_is_an_empty_line() -> None:
    assert _drawn(Schedule.of([["0F0", "0B0"], []])) == "rank 0  F0 B0 B0\nrank 1"
