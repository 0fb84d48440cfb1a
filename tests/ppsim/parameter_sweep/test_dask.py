"""Sweeps on a real Dask cluster: two worker processes on loopback, one killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dask.distributed import Client, LocalCluster

from ppsim import load_sweep, sweep
from tests.support.sweeping import calls, counted, odd_fails

pytestmark = pytest.mark.xdist_group("dask")  # one cluster serves all


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_nothing_is_lost_or_doubled_when_a_worker_is_killed(client: Client, tmp_path: Path) -> None:
    store, folder = tmp_path / "s.sqlite", tmp_path / "calls"
    folder.mkdir()
    (victim, *_), before = client.run(os.getpid).values(), set(client.run(os.getpid).values())
    grid = {"a": range(60), "folder": [str(folder)], "pause_s": [0.03]}
    killed = []

    executor = client.get_executor()
    submit = executor.submit

    # One worker is killed as the twentieth call, or a later one, comes back.
    def submit_and_watch(*arguments: object, **options: object) -> object:
        future = submit(*arguments, **options)
        future.add_done_callback(lambda _: kill_once())
        return future

    def kill_once() -> None:
        if not killed and sum(calls(folder).values()) >= 20:
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)

    executor.submit = submit_and_watch
    found = sweep(counted, grid, executor, store=store, progress=False)
    assert killed == [victim]
    assert [row.result["square"] for row in found] == [a * a for a in range(60)]
    assert {row.result["process"] for row in found} >= before - {victim}
    kept = load_sweep(store)
    assert sorted(row.configuration["a"] for row in kept) == list(range(60))
    called = calls(folder)
    assert len(called) == 60
    # Computed twice is at most what the killed worker had computed or begun without its coming back.
    assert sum(called.values()) <= 60 + 20

    again = sweep(counted, grid, executor, store=store, progress=False)
    assert [row.result for row in again] == [row.result for row in found]
    assert calls(folder) == called


def test_failures_come_back_from_a_cluster(client: Client, tmp_path: Path) -> None:
    found = sweep(odd_fails, {"a": range(4), "folder": [str(tmp_path)]}, client.get_executor(), progress=False)
    assert [row.result for row in found] == [0, None, 2, None]
    assert found[3].error == "ArithmeticError: 3 is odd"
