"""Sweeps: every point is computed once and kept, whatever dies in between."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import ppsim
from ppsim import SweepResult, load_sweep, sweep
from tests.support import sweeping
from tests.support.sweeping import calls

ROOT = Path(__file__).parents[3]


def _quiet(*arguments: Any, **options: Any) -> SweepResult:
    return sweep(*arguments, progress=False, **options)


@pytest.mark.parametrize("kind", ["default", "threads", "processes"])
def test_rows_come_in_grid_order_on_any_executor(kind: str) -> None:
    grid = {"a": [2, 1, 3], "b": [10, 0.5]}
    if kind == "default":
        found = _quiet(sweeping.total, grid)
    else:
        threads = ThreadPoolExecutor(3)
        with threads if kind == "threads" else ProcessPoolExecutor(2, get_context("spawn")) as executor:
            found = _quiet(sweeping.total, grid, executor)
            assert executor.submit(int, "7").result() == 7  # the caller's to close
    assert [row.result for row in found] == [12, 2.5, 11, 1.5, 13, 3.5]
    assert [dict(row.configuration) for row in found[:2]] == [{"a": 2, "b": 10}, {"a": 2, "b": 0.5}]
    assert found.failed == []


def test_values_arrive_as_they_were_given() -> None:
    found = _quiet(sweeping.cores_of, {"machine": [sweeping.Machine(cores=n) for n in (2, 4)], "path": [Path("a/b")]})
    assert [row.result for row in found] == [{"cores": 2, "is_path": True}, {"cores": 4, "is_path": True}]
    assert found[1].configuration["machine"] == sweeping.Machine(cores=4)


def test_what_is_stored_is_not_computed_again_and_equal_points_once(tmp_path: Path) -> None:
    store, folder = tmp_path / "s.sqlite", tmp_path / "calls"
    folder.mkdir()
    with ThreadPoolExecutor(2) as executor:
        first = [{"a": a, "folder": str(folder)} for a in (1, 2, 1, 1)]
        assert [row.result["square"] for row in _quiet(sweeping.counted, first, executor, store=store)] == [1, 4, 1, 1]
        found = _quiet(sweeping.counted, {"folder": [str(folder)], "a": range(4)}, executor, store=store)
        assert [row.result["square"] for row in found] == [0, 1, 4, 9]
        assert len(_quiet(sweeping.counted, {"folder": [str(folder)], "a": []}, executor, store=store)) == 0
    assert calls(folder) == {str(a): 1 for a in range(4)}
    assert len(load_sweep(store)) == len(load_sweep(store, sweeping.counted)) == 4
    assert len(load_sweep(store, "tests.support.sweeping.square")) == 0


def test_a_failure_is_a_row_stops_nothing_and_is_tried_again_next_time(tmp_path: Path) -> None:
    store, folder = tmp_path / "s.sqlite", tmp_path / "calls"
    folder.mkdir()
    grid = {"a": [*range(6), 3], "folder": [str(folder)]}
    with ThreadPoolExecutor(2) as executor:
        found = _quiet(sweeping.odd_fails, grid, executor, store=store)
        assert [row.result for row in found] == [0, None, 2, None, 4, None, None]
        assert found[1].error == "ArithmeticError: 1 is odd"
        assert "in odd_fails" in (found[1].traceback or "")
        assert len(found.failed) == 4
        assert list(found.to_frame()["error"].isna()) == [True, False, True, False, True, False, False]
        (folder / "mended").touch()
        again = _quiet(sweeping.odd_fails, grid, executor, store=store)
    assert [row.result for row in again] == [0, 1, 2, 3, 4, 5, 3]
    assert again.failed == []
    assert calls(folder) == {"0": 1, "1": 2, "2": 1, "3": 2, "4": 1, "5": 2, "mended": 1}


def test_results_may_be_whatever_json_can_hold() -> None:
    with ThreadPoolExecutor(1) as executor:
        rows = _quiet(sweeping.returns, {"a": range(5)}, executor)
        failed = _quiet(sweeping.exits, {"a": [3]}, executor)
    assert [rows[n].result for n in (0, 1, 2, 4)] == [0.5, {"x": 3, "y": [0, 1]}, math.inf, None]
    assert "return a number, or a dict" in (rows[3].error or "")
    assert failed[0].error == "SystemExit: 3"


def test_a_frame_has_configuration_results_and_error() -> None:
    with ThreadPoolExecutor(1) as executor:
        frame = _quiet(sweeping.square, {"a": [3, 4]}, executor).to_frame()
        plain = _quiet(sweeping.total, [{"a": 1, "b": 2}], executor).to_frame()
        clash = _quiet(lambda square: {"square": 2, "error": 0.5}, {"square": [1]}, executor).to_frame()
        assert len(_quiet(sweeping.square, [], executor).to_frame()) == 0
    assert frame.to_dict("list") == {"a": [3, 4], "square": [9, 16], "error": [None, None]}
    assert plain.to_dict("list") == {"a": [1], "b": [2], "result": [3], "error": [None]}
    assert list(clash.columns) == ["square", "result.square", "result.error", "error"]


def test_a_dead_worker_is_replaced_and_its_points_are_computed(tmp_path: Path) -> None:
    found = _quiet(sweeping.dies_once, {"a": range(20), "folder": [str(tmp_path)], "deadly": [7]}, workers=2)
    assert [row.result for row in found] == list(range(20))
    assert calls(tmp_path)["7"] == 2


def test_a_point_that_always_ends_its_process_is_named_and_given_up(tmp_path: Path) -> None:
    store, folder = tmp_path / "s.sqlite", tmp_path / "calls"
    folder.mkdir()
    grid = {"a": range(12), "folder": [str(folder)], "deadly": [5]}
    found = _quiet(sweeping.ends_its_process, grid, workers=2, store=store)
    assert [row.result for row in found] == [0, 1, 2, 3, 4, None, *range(6, 12)]
    assert "its process ended" in (found[5].error or "")
    assert calls(folder)["5"] == 3
    assert len(load_sweep(store)) == 12


def test_where_every_process_dies_the_sweep_ends() -> None:
    with pytest.raises(RuntimeError, match="5 points were lost with their processes, and none was computed"):
        _quiet(sweeping.always_dies, {"a": range(1000)}, workers=2)


def test_a_broken_executor_of_the_caller_is_named_with_a_remedy(tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as executor,
        pytest.raises(RuntimeError, match=r"executor is broken .* is in the store: sweep again with a new executor"),
    ):
        _quiet(sweeping.always_dies, {"a": [1, 2]}, executor, store=tmp_path / "s.sqlite")


class _Counting(Executor):
    """Threads; counts how many futures were under way at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2)
        self._lock = threading.Lock()
        self.now = self.most = self.submitted = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._lock:
            self.now += 1
            self.submitted += 1
            self.most = max(self.most, self.now)
        future = self._threads.submit(fn, *args, **kwargs)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        with self._lock:
            self.now -= 1


def test_futures_are_bounded_and_quick_points_share_them() -> None:
    executor = _Counting()
    found = _quiet(sweeping.total, {"a": range(100), "b": range(50)}, executor, in_flight=6)
    assert sum(row.result for row in found) == sum(a + b for a in range(100) for b in range(50))
    assert executor.most <= 6
    assert executor.submitted < 2500


def test_the_bar_goes_to_standard_error_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as executor:
        sweep(sweeping.square, {"a": [1]}, executor, progress=False)
        assert capsys.readouterr() == ("", "")
        sweep(sweeping.square, {"a": [1]}, executor)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "points" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be from 1 to 10000, got 0"),
        ({"in_flight": 0}, "in_flight must be from 1"),
        ({"grid": {"b": [1]}}, "cannot be called with b"),
        ({"function": functools.partial(max, threading.Lock())}, "the function cannot be sent to another process"),
        ({"grid": {"a": [threading.Lock()]}}, "no canonical form"),
    ],
)
def test_what_cannot_be_swept_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"function": sweeping.square, "grid": {"a": [1]}, **options}
    with pytest.raises(ValueError, match=message):
        _quiet(**arguments)


def test_a_lambda_may_run_on_threads_but_not_into_a_store(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        assert _quiet(lambda a: a + 1, {"a": [1]}, executor)[0].result == 2
        with pytest.raises(ValueError, match="a store needs a function"):
            _quiet(lambda a: a + 1, {"a": [1]}, executor, store=tmp_path / "s.sqlite")
        with pytest.raises(ValueError, match="the executor has its own"):
            _quiet(sweeping.square, {"a": [1]}, executor, workers=2)
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as processes,
        pytest.raises(ValueError, match="a process pool needs a function that can be imported"),
    ):
        _quiet(lambda a: a, {"a": [1]}, processes)


_SCRIPT = """
import sys
from dataclasses import dataclass
import ppsim
from tests.support.sweeping import note

@dataclass(frozen=True)
class Size:
    width: int

def area(size, height, folder, pause_s):
    import time
    note(folder, f"{size.width}x{height}")
    time.sleep(pause_s)
    return {"area": size.width * height}

grid = {"size": [Size(n) for n in range(10)], "height": range(6)}
grid |= {"folder": [sys.argv[1]], "pause_s": [float(sys.argv[3])]}
found = ppsim.sweep(area, grid, store=sys.argv[2], workers=2, progress=False)
print([row.result["area"] for row in found])
"""


def _start(tmp_path: Path, pause_s: float = 0.0) -> subprocess.Popen[str]:
    """The script above, without a guard, in a process of its own."""
    script, folder = tmp_path / "areas.py", tmp_path / "calls"
    script.write_text(_SCRIPT)
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(tmp_path / "s.sqlite"), str(pause_s)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(condition: Any) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


AREAS = str([width * height for width in range(10) for height in range(6)]) + "\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    pause_s = 0.05
    first = _start(tmp_path, pause_s)
    _wait_for(lambda: sum(calls(tmp_path / "calls").values()) >= 12 or first.poll() is not None)
    first.send_signal(how)
    _, shown = first.communicate(timeout=60)  # its workers hold its pipes: they have ended, too
    assert first.returncode != 0
    assert how == signal.SIGKILL or "KeyboardInterrupt" in shown
    kept = load_sweep(tmp_path / "s.sqlite")
    called = calls(tmp_path / "calls")
    # Lost is at most what had not come back: what was under way, and what was underway back to the parent.
    assert 0 < len(kept) <= sum(called.values()) <= len(kept) + 8
    second = _start(tmp_path, pause_s)
    assert second.communicate(timeout=60)[0] == AREAS
    called = calls(tmp_path / "calls")
    done = [f"{row.configuration['size']['width']}x{row.configuration['height']}" for row in kept]
    assert len(called) == 60
    assert {label: called[label] for label in done} == dict.fromkeys(done, 1)
    assert sum(called.values()) <= 60 + 8
    assert len(load_sweep(tmp_path / "s.sqlite")) == 60


def test_two_sweeps_share_a_store(tmp_path: Path) -> None:
    both = [_start(tmp_path, 0.01), _start(tmp_path, 0.01)]
    assert [process.communicate(timeout=60)[0] for process in both] == [AREAS, AREAS]
    kept = load_sweep(tmp_path / "s.sqlite")
    assert sorted(row.result["area"] for row in kept) == sorted(w * h for w in range(10) for h in range(6))


def test_what_a_session_or_script_defines_may_be_swept_at_any_point_of_it() -> None:
    script = (
        "import ppsim\ndef f(a):\n    return a\nprint(ppsim.sweep(f, {'a': [1]}, progress=False)[0].result)\n"
        "def g(a):\n    return f(a) + 1\nprint(ppsim.sweep(g, {'a': [1]}, progress=False)[0].result)\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("1\n2\n", "")


def test_a_lambda_may_run_in_processes() -> None:
    offset = 10
    assert [row.result for row in _quiet(lambda a: a + offset, {"a": [1, 2]}, workers=1)] == [11, 12]


def test_the_library_itself_can_be_swept() -> None:
    grid = {"name": ["1f1b", "afab"], "ranks": [2, 4], "microbatches": [4, 8]}
    with ThreadPoolExecutor(2) as executor:
        rows = _quiet(_bubble, grid, executor)
    by_name = {name: [row.result for row in rows if row.configuration["name"] == name] for name in grid["name"]}
    assert by_name["1f1b"] == pytest.approx([(p - 1) / (m + p - 1) for p in (2, 4) for m in (4, 8)])
    assert by_name["1f1b"] == pytest.approx(by_name["afab"])


def _bubble(name: str, ranks: int, microbatches: int) -> float:
    schedule = ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches)
    stage = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    return ppsim.simulate(schedule, [stage] * ranks).bubble_fraction
