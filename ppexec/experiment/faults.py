"""Faults: what can happen to a rank in the middle of a step, to be injected at any action."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from ppexec.workers.worker import Worker
from ppsim import Kind

_METHODS = {
    Kind.F: "forward",
    Kind.R: "recompute",
    Kind.B: "backward",
    Kind.I: "backward_input",
    Kind.W: "backward_weight",
}


def _raise() -> None:
    raise ZeroDivisionError("an injected fault")


def _run_out_of_memory() -> None:
    raise MemoryError("a tensor of 4 TiB")


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "leaves": lambda: os._exit(0),
    "raises": _raise,
    "memory": _run_out_of_memory,
}
"""What a rank does to itself, by name."""


def arm(worker: Worker, *, rank: int, action: int, fault: str) -> None:
    """Let every later step fail while a rank runs an action. A task: call it in all workers.

    Parameters
    ----------
    worker : Worker
        This process.
    rank : int
        Which rank fails, in all replicas.
    action : int
        Its action, counted from 0 in the rank's sequence.
    fault : str
        One of `FAULTS`.
    """
    for held in worker.ranks:
        if held.number != rank:
            continue
        row = held.runtime.actions[action][0]
        usual: Callable[..., Any] = getattr(row.stage, _METHODS[row.kind])
        setattr(row.stage, _METHODS[row.kind], _failing(usual, row.microbatch, FAULTS[fault]))


def _failing(usual: Callable[..., Any], microbatch: int, fail: Callable[[], None]) -> Callable[..., Any]:
    """A stage's method that fails on one microbatch."""

    def method(number: int, *given: Any, **more: Any) -> Any:
        if number == microbatch:
            fail()
        return usual(number, *given, **more)

    return method
