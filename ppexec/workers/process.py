"""A worker process: how it is started, and what it does until its pool closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from ppexec.config.config import RunConfig
from ppexec.machine.environment import ALLOCATOR
from ppexec.workers.failure import Failure
from ppsim import StageCost


def start_server() -> None:
    """Start the fork server with Ctrl-C blocked, for which it would print the frames of what it imports."""
    resource_tracker.ensure_running()  # the server starts it too, and that would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(process: Any) -> None:
    """Start a worker. If Ctrl-C comes meanwhile, end the server, which may still import for seconds."""
    try:
        process.start()
    except KeyboardInterrupt:
        server = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
        if server is not None:
            os.kill(server, signal.SIGKILL)
        raise


@contextlib.contextmanager
def worker_environment() -> Iterator[None]:
    """Set the allocator's variables while the fork server starts, since a process reads them only at its start."""
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update({name: value for name, value in ALLOCATOR.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def no_main_module() -> Iterator[None]:
    """Hide the caller's script, so that workers do not run it again and it needs no `__main__` guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def serve(connection: Connection, lifeline: Connection) -> None:
    """Answer requests in a worker process until the pool closes or its process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr  # what a model prints: the caller's standard output may be one JSON object
    threading.Thread(target=_exit_with, args=(lifeline,), daemon=True).start()
    worker: Any = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        task, arguments = request
        try:
            if task is set_up:
                if worker is not None:
                    worker.close()
                worker = None
                worker = set_up(**arguments)
                answer = None
            else:
                answer = task(worker, **arguments)
        except Exception as error:
            answer = Failure.of(error)
        connection.send(answer)


def set_up(
    *,
    port: int,
    prefix: str,
    rank: int,
    world_size: int,
    config: RunConfig,
    costs: Sequence[StageCost] | None,
    board: str | None,
    path: list[str],
    directory: str,
) -> Any:
    """Join the world of a run and build this process's Worker."""
    from ppexec.machine.mesh import join_world
    from ppexec.machine.nccl import prepare_process
    from ppexec.workers.worker import Worker

    # The caller's import path and directory may have changed since this process started.
    sys.path[:] = path
    os.chdir(directory)
    if config.device == "cuda":
        prepare_process(rank, shares_gpu=config.devices == "shared")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")  # nobody else may connect
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    join_world(
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore(prefix, store),
        backend=config.backend,
        timeout_s=config.longest_wait_s,
    )
    return Worker(config, costs, board=board)


def _exit_with(lifeline: Connection) -> None:
    """End this process when the pool's process has ended, even in the middle of a task."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
