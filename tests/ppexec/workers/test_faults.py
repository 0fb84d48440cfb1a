"""Faults at every action: the run ends soon, says who, where and why, leaves nothing behind, and the pool goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import ppexec
from ppexec import RunConfig, Session, WorkerError, WorkerPool
from ppexec.experiment.faults import arm
from tests.support.remote import tiny

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are watched through /proc"),
    pytest.mark.filterwarnings("ignore:2 microbatches over 2 ranks"),
]

TRANSPORTS = {"shared memory": {}, "gloo": {"receive_window": 2}}
SCHEDULES = {name: {"schedule": name, "ranks": 2, "microbatches": 2} for name in ("1f1b", "zb-h1")}
ACTIONS = [
    (name, rank, action) for name, count in (("1f1b", 4), ("zb-h1", 6)) for rank in (0, 1) for action in range(count)
]


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """A pool that the tests of this file break again and again."""
    with WorkerPool() as workers:
        yield workers


def broken(pool: WorkerPool, config: RunConfig, *, rank: int, action: int, fault: str) -> tuple[WorkerError, float]:
    """The error of a step with a fault, and after how many seconds it came."""
    with Session(config, pool=pool) as session:
        processes = pool.process_ids
        pool.call(config.world_size, arm, rank=rank, action=action, fault=fault)
        began_s = time.monotonic()
        with pytest.raises(WorkerError) as raised:
            session.measure(1)
        took_s = time.monotonic() - began_s
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    return raised.value, took_s


def action_name(config: RunConfig, rank: int, action: int) -> str:
    program = config.pipeline.program
    return str(program.action_of(int(program.action_start[program.rank_actions[rank] + action])))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("schedule", "rank", "action"), ACTIONS)
def test_a_rank_that_is_killed_at_any_action_is_named(
    own_pool: WorkerPool, schedule: str, rank: int, action: int, transport: str
) -> None:
    config = tiny(**SCHEDULES[schedule], **TRANSPORTS[transport])
    error, took_s = broken(own_pool, config, rank=rank, action=action, fault="killed")
    name = action_name(config, rank, action)
    assert re.match(rf"rank {rank} \(process \d+\) was killed by SIGKILL .* in action {name} of step 1", str(error))
    assert took_s < 10
    # What both ranks did is kept, the action under way too.
    assert error.partial_trace is not None
    program, trace = config.pipeline.program, error.partial_trace
    begun = [str(program.action_of(row)) for row in trace.start_ns.nonzero()[0].tolist() if program.rank[row] == rank]
    assert len(begun) == action + 1
    assert begun[-1] == name
    assert sum(trace.end_ns[row] > 0 for row in program.rows_of(rank)) == action


@pytest.mark.one_in(3)
@pytest.mark.parametrize("fault", ["raises", "leaves", "memory"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("rank", "action"), [(rank, action) for rank in (0, 1) for action in range(4)])
def test_a_rank_that_fails_at_any_action_is_named(
    own_pool: WorkerPool, rank: int, action: int, transport: str, fault: str
) -> None:
    config = tiny(**SCHEDULES["1f1b"], **TRANSPORTS[transport])
    error, took_s = broken(own_pool, config, rank=rank, action=action, fault=fault)
    said = {
        "raises": "failed in action {}.*: .*ZeroDivisionError: an injected fault",
        "leaves": r"left early \(exit code 0\) in action {}",
        "memory": r"failed in action {}.*: out of memory \(a tensor of 4 TiB\): take a smaller micro batch",
    }[fault].format(action_name(config, rank, action))
    assert re.match(rf"rank {rank} \(process \d+\) {said}", str(error))
    assert took_s < 10


@pytest.mark.one_in(3)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("rank", "action"), [(rank, action) for rank in (0, 1) for action in range(4)])
def test_a_rank_that_is_stopped_at_any_action_is_named(
    own_pool: WorkerPool, rank: int, action: int, transport: str
) -> None:
    config = tiny(**{**SCHEDULES["1f1b"], **TRANSPORTS[transport], "timeout_s": 1.0})
    error, took_s = broken(own_pool, config, rank=rank, action=action, fault="stopped")
    assert re.match(rf"no rank has made progress for 1 s: rank {rank} \(process \d+\) is stopped in", str(error))
    assert f"  rank {rank}: in action {action_name(config, rank, action)} of step 1" in error.details.splitlines()
    assert took_s < 10


def test_the_pool_serves_the_next_run(own_pool: WorkerPool) -> None:
    """After all the faults above, or as many as were selected."""
    broken(own_pool, tiny(**SCHEDULES["1f1b"]), rank=1, action=2, fault="killed")
    assert ppexec.verify(tiny(**SCHEDULES["1f1b"]), pool=own_pool).passed


def test_a_partial_trace_opens_in_perfetto(own_pool: WorkerPool, tmp_path: Path) -> None:
    error, _ = broken(own_pool, tiny(**SCHEDULES["1f1b"]), rank=0, action=2, fault="raises")
    assert error.partial_trace is not None
    error.partial_trace.save(tmp_path / "partial.json")
    events = json.loads((tmp_path / "partial.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in slices} >= {"0F0", "0F1", "1F0", "0B0 (did not end)"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)


def test_no_descriptor_or_memory_is_left_by_runs_that_break(own_pool: WorkerPool) -> None:
    def held() -> tuple[Counter[str], set[str]]:
        """Descriptors by what they are, and shared memory."""
        gc.collect()
        kinds: Counter[str] = Counter()
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
                kinds[re.sub(r"\d+", "*", os.readlink(descriptor))] += 1
        return kinds, set(os.listdir("/dev/shm"))

    broken(own_pool, tiny(**SCHEDULES["1f1b"]), rank=0, action=0, fault="killed")
    before = held()
    for action in range(3):
        broken(own_pool, tiny(**SCHEDULES["1f1b"]), rank=0, action=action, fault="killed")
    deadline = time.monotonic() + 10  # the system closes what a process held some time after it has ended
    while (after := held()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after == before
