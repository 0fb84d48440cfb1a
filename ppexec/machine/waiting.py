"""Waiting: how a rank spends a stated time, asleep or at work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

from ppexec.machine.clock import now_ns

_PR_SET_TIMERSLACK = 29
_AWAKE_NS = 150_000  # a sleep ends about a tenth of a millisecond late


def wait_s(seconds: float) -> None:
    """Wait for this long: asleep but for the end, since sleeping itself ends about a tenth of a millisecond late."""
    until = now_ns() + round(seconds * 1e9)
    while (left := until - now_ns()) > _AWAKE_NS:
        time.sleep((left - _AWAKE_NS) / 1e9)
    while now_ns() < until:
        os.sched_yield()  # gives the core to any process that has work


def burn_s(seconds: float) -> None:
    """Keep a core at work for this long, by the CPU time of this thread: who waits for a core does not advance."""
    until = time.thread_time_ns() + round(seconds * 1e9)
    while time.thread_time_ns() < until:
        pass


def sharpen_sleep() -> None:
    """Ask Linux to end this thread's sleeps on time, not up to 50 us later to save wake-ups."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
