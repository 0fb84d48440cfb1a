"""Waiting: ways for a rank to spend a given time, asleep or busy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

from ppexec.machine.clock import now_ns

_PR_SET_TIMERSLACK = 29
_AWAKE_NS = 150_000  # above the delay with which a sleep ends, about 100 us


def wait_s(seconds: float) -> None:
    """Wait this long: asleep at first, and awake at the end, since a sleep ends about 100 us late."""
    until = now_ns() + round(seconds * 1e9)
    while (left := until - now_ns()) > _AWAKE_NS:
        time.sleep((left - _AWAKE_NS) / 1e9)
    while now_ns() < until:
        os.sched_yield()  # gives the core to any process that has work


def burn_s(seconds: float) -> None:
    """Compute for this much CPU time of this thread. Time in which it waits for a core does not count."""
    until = time.thread_time_ns() + round(seconds * 1e9)
    while time.thread_time_ns() < until:
        pass


def sharpen_sleep() -> None:
    """Ask Linux to end this thread's sleeps on time, instead of up to 50 us late to save wake-ups."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
