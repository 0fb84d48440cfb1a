"""WorkerPool: started once, fed many runs; what dies is named, and nothing outlives the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import ppexec
from ppexec import Session, WorkerError, WorkerPool
from ppexec.workers.worker import Worker
from ppsim.errors import RunError
from tests.support.factories import spelled
from tests.support.remote import on_every_rank, tiny

SLEEPS = spelled("with_one", kind="Sleeps", at=1)


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    """A pool that a test may break."""
    with WorkerPool() as workers:
        yield workers


def is_running(process_id: int) -> bool:
    """Neither gone nor a zombie that nobody has collected."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes true while one would still wait for it."""
    for _ in range(600):
        if holds():
            return True
        time.sleep(0.05)
    return False


def test_workers_are_kept_from_run_to_run_and_added_when_needed(own_pool: WorkerPool) -> None:
    processes = {}
    for ranks in (2, 3, 1, 2, 3):
        report = ppexec.verify(tiny(ranks=ranks, layers=6, microbatches=6), pool=own_pool)
        assert report.passed
        processes[ranks] = own_pool.process_ids
    assert len(own_pool.process_ids) == 3
    assert processes[2] == processes[3]
    assert os.getpid() not in own_pool.process_ids


def test_a_closed_pool_has_no_processes_left(own_pool: WorkerPool) -> None:
    ppexec.verify(tiny(), pool=own_pool)
    processes = own_pool.process_ids
    assert all(is_running(process) for process in processes)
    own_pool.close()
    assert own_pool.process_ids == []
    assert not any(is_running(process) for process in processes)


def test_a_session_whose_workers_have_ended_says_so(own_pool: WorkerPool) -> None:
    """A call after one that failed was a bare complaint about `zip`."""
    with Session(tiny(), pool=own_pool) as session:
        session.measure(1)
        os.kill(own_pool.process_ids[0], signal.SIGKILL)
        with pytest.raises(WorkerError):
            session.measure(1)
        with pytest.raises(RunError, match=r"and 0 are left: an earlier call failed .* with a new Session"):
            session.measure(1)
    assert ppexec.verify(tiny(), pool=own_pool).passed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_in_a_step_is_named_and_the_pool_goes_on(own_pool: WorkerPool, rank: int) -> None:
    """The other ranks wait for messages that never come; nobody waits for them."""
    with Session(tiny(model=SLEEPS), pool=own_pool) as session:
        victim = own_pool.process_ids[rank]
        others = own_pool.process_ids
        killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        killer.start()
        with pytest.raises(WorkerError, match=rf"rank {rank} \(process {victim}\) was killed by SIGKILL"):
            session.measure(1)
        killer.join()
    assert not any(is_running(process) for process in others)
    assert ppexec.verify(tiny(), pool=own_pool).passed
    assert victim not in own_pool.process_ids


@pytest.mark.parametrize("at", [0, 3])
def test_a_worker_that_kills_itself_is_named(own_pool: WorkerPool, at: int) -> None:
    """Its peer sees a lost connection at about the same time, and is not the one to blame."""
    with pytest.raises(WorkerError, match=rf"rank {at // 2} \(process \d+\) was killed by SIGKILL"):
        ppexec.verify(tiny(model=spelled("with_one", kind="Dies", at=at)), pool=own_pool)
    assert ppexec.verify(tiny(), pool=own_pool).passed


def lose_each_other(worker: Worker) -> None:
    """Rank 1 does not hear from rank 0 in time, and ends. Rank 0 sees its connection closed, and says so first."""
    if dist.get_rank() == 0:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11652")
    time.sleep(0.3)
    raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 100ms for recv operation")


def test_of_ranks_that_lost_each_other_the_one_that_timed_out_is_named(own_pool: WorkerPool) -> None:
    """The first answer was shown: a lost connection, which is what the other rank's time-out led to."""
    with Session(tiny(), pool=own_pool), pytest.raises(WorkerError, match=r"rank 1 .* Timed out waiting"):
        own_pool.call(2, lose_each_other)


@pytest.mark.parametrize("at", [0, 3])
def test_a_value_error_of_the_model_is_no_bad_input(own_pool: WorkerPool, at: int) -> None:
    """It was taken for one of ours, without rank or frames."""
    with pytest.raises(
        WorkerError,
        match=rf"rank {at // 2} \(process \d+\) failed in action \dF0.*: layer {at} \(Raises\) raised ValueError",
    ):
        ppexec.verify(tiny(model=spelled("with_one", kind="Raises", at=at)), pool=own_pool)
    assert ppexec.verify(tiny(), pool=own_pool).passed


@pytest.mark.parametrize("at", [0, 3])
def test_another_error_in_a_worker_names_rank_and_error(own_pool: WorkerPool, at: int) -> None:
    with pytest.raises(
        WorkerError,
        match=rf"rank {at // 2} \(process \d+\) failed in action \dF0 .*: layer {at} \(Breaks\) raised KeyError",
    ):
        ppexec.verify(tiny(model=spelled("with_one", kind="Breaks", at=at)), pool=own_pool)
    assert ppexec.verify(tiny(), pool=own_pool).passed


def test_a_run_in_which_nothing_moves_ends_and_says_where_each_rank_stands(own_pool: WorkerPool) -> None:
    ppexec.verify(tiny(), pool=own_pool)  # imports are done, so that the next run is set up in time
    session = Session(tiny(model=SLEEPS, timeout_s=2), pool=own_pool)
    with pytest.raises(
        WorkerError, match=r"no rank has made progress for 2 s: rank 0 .* stands in action 0F0 of step 1, during"
    ) as raised:
        session.measure(1)
    assert raised.value.details.splitlines() == [
        "where each rank stands:",
        "  rank 0: in action 0F0 of step 1",
        "  rank 1: at action 1F0, waits for message 0 of rank 0 after its action 0F0, in step 1",
    ]
    assert ppexec.verify(tiny(), pool=own_pool).passed


MODEL = """
import torch
from torch import nn
import ppexec

def make(config):
    return ppexec.Model(
        layers=[nn.Linear(3, 3) for _ in range(config.layers)],
        sample=lambda index: (torch.full((2, 3), float(index)), torch.zeros(2, 3)),
        loss=nn.functional.mse_loss,
    )
"""


def test_a_model_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_of_a_user.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with WorkerPool() as workers:
        assert ppexec.verify(tiny(model="model_of_a_user:make"), pool=workers).passed


def test_workers_that_were_started_elsewhere_find_it_too(
    own_pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory counts when a run is set up, not when its workers were started."""
    ppexec.verify(tiny(), pool=own_pool)
    (tmp_path / "model_of_another.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert ppexec.verify(tiny(model="model_of_another:make"), pool=own_pool).passed


SCRIPT = """
import sys
print("once")
import ppexec
config = ppexec.RunConfig(layers=2, hidden=4, seq=1, micro_batch_size=1, microbatches=4, threads=1)
pool = ppexec.WorkerPool()
assert ppexec.verify(config, pool=pool).passed
print(*pool.process_ids, flush=True)
sys.stdin.read()
"""


def test_workers_of_a_killed_program_end_and_it_needs_no_main_guard(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "once\n"
        processes = [int(word) for word in program.stdout.readline().split()]  # a second "once" is no number
        assert len(processes) == 2
        assert all(is_running(process) for process in processes)
        program.kill()
    assert eventually(lambda: not any(is_running(process) for process in processes))


def test_workers_keep_no_files_of_earlier_runs(own_pool: WorkerPool) -> None:
    """Caches of sharded operations grew with every shape, and kept the groups of old meshes open."""

    def open_files() -> int:
        return sum(len(os.listdir(f"/proc/{process}/fd")) for process in own_pool.process_ids)

    counts = []
    for hidden in range(8, 56, 8):
        assert ppexec.verify(tiny(ranks=1, tp=2, hidden=hidden), pool=own_pool).passed
        counts.append(open_files())
    assert len(set(counts)) == 1


def kept() -> dict[str, int]:
    """What a worker has of earlier runs, as its next one begins."""
    return {"hook": id(sys.excepthook), "operations": len(FakeTensorMode.cache)}


def test_workers_keep_no_hooks_and_no_shapes_of_earlier_runs(own_pool: WorkerPool) -> None:
    """PyTorch puts a hook before that of the last world, and remembers each shape of a sharded operation."""
    found = []
    for hidden in (8, 16):
        assert ppexec.verify(tiny(ranks=1, tp=2, hidden=hidden), pool=own_pool).passed
        found.append(on_every_rank(own_pool, 2, kept))
    assert found[0] == found[1]
    assert [each["operations"] for each in found[1]] == [0, 0]


def test_the_store_keeps_the_addresses_of_the_last_run_only(own_pool: WorkerPool) -> None:
    """They were kept for as long as the pool lived, some kilobytes of each run."""
    counts = []
    for ranks in (2, 3, 2):
        with Session(tiny(ranks=ranks, layers=ranks), pool=own_pool):
            assert own_pool._store is not None
            counts.append(own_pool._store.num_keys())
    assert counts[0] == counts[2] < counts[1]


def test_threads_of_a_worker_share_its_memory(own_pool: WorkerPool) -> None:
    """Each run has new threads; parts of memory of their own grew for hundreds of runs."""
    with Session(tiny(), pool=own_pool) as session:
        assert session.environment()["worker_allocator"]["MALLOC_ARENA_MAX"] == "1"


def test_workers_of_shared_gpus_do_not_run_on_gpus_of_their_own(
    own_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL reads its settings once in a process: runs after one with shared GPUs went over sockets."""
    began: list[list[int]] = []

    def note(world_size: int, *_: object) -> list[None]:
        began.append(own_pool.process_ids[:world_size])
        return []

    monkeypatch.setattr(own_pool, "_call", note)
    for devices in ("own", "shared", "shared", "own"):
        config = tiny()
        for name, value in {"device": "cuda", "devices": devices}.items():
            object.__setattr__(config, name, value)  # no GPU is needed to see which processes are asked
        own_pool.set_up(config)
    first, second, third, last = began
    assert second == third
    assert not {*first} & {*second}
    assert not {*second} & {*last}
