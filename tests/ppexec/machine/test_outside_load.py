"""Watch: what others used is what the machine used, less what is ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ppexec.machine.outside_load import CpuTimes, OutsideLoad, read_proc

TICK = 1 / os.sysconf("SC_CLK_TCK")


def proc(root: Path, *, stat: str, processes: dict[int, tuple[int, int]]) -> Path:
    (root / "stat").write_text(f"cpu  {stat}\ncpu0 1 2 3\n")
    for process, (user, system) in processes.items():
        (root / str(process)).mkdir()
        (root / str(process) / "stat").write_text(f"{process} (a) b) S {' '.join('0' * 10)} {user} {system} 0 0\n")
    return root


def test_idle_and_waiting_for_a_disk_are_not_busy_and_children_are_ours(tmp_path: Path) -> None:
    root = proc(tmp_path, stat="100 1 20 5000 700 2 3 4 0 0", processes={os.getpid(): (10, 5), 1: (30, 1)})
    found = read_proc([1], root)
    assert found.busy_s == pytest.approx((100 + 1 + 20 + 2 + 3 + 4) * TICK)
    assert found.own_s == pytest.approx(46 * TICK)


def test_this_machine_can_be_read() -> None:
    before, after = read_proc([]), read_proc([])
    assert 0 < before.busy_s <= after.busy_s
    assert before.own_s > 0


@pytest.mark.parametrize(
    ("busy_s", "own_s", "length_s", "is_disturbed"),
    [
        (1.0, 1.0, 1.0, False),
        (1.1, 1.0, 1.0, True),
        (1.04, 1.0, 1.0, False),  # a twentieth of a core at most
        (0.02, 0.0, 0.1, False),  # two of the kernel's ticks
        (0.04, 0.0, 0.1, True),
        (0.5, 0.6, 1.0, False),  # counted at different moments
    ],
)
def test_a_window_is_disturbed_by_others_alone(
    busy_s: float, own_s: float, length_s: float, is_disturbed: bool
) -> None:
    times = iter(
        [CpuTimes(busy_s=5, own_s=2, now_s=9), CpuTimes(busy_s=5 + busy_s, own_s=2 + own_s, now_s=9 + length_s)]
    )
    with OutsideLoad(read=lambda _: next(times)).window([]) as window:
        pass
    assert window.is_disturbed is is_disturbed
    assert window.length_s == pytest.approx(length_s)
