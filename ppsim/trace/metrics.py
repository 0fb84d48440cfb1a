"""Metrics: what is read off a trace, whichever clock made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]


def first_start_s(trace: Trace) -> Seconds:
    """Each rank's first start, shape (p,); the step's first start for a rank without actions."""
    return _at_rank_edge(trace, trace.start_s, first=True)


def last_end_s(trace: Trace) -> Seconds:
    """Each rank's last end, shape (p,); the step's first start for a rank without actions."""
    return _at_rank_edge(trace, trace.end_s, first=False)


def _at_rank_edge(trace: Trace, times_s: Seconds, *, first: bool) -> Seconds:
    rows = trace.program.action_start[trace.program.rank_actions]
    begin, end = rows[:-1], rows[1:]
    index = begin if first else end - 1
    safe = np.clip(index, 0, len(times_s) - 1)
    return np.where(end > begin, times_s[safe], trace.start_s.min())


def compute_s(trace: Trace) -> Seconds:
    """Each rank's time in compute actions, shape (p,)."""
    lengths = trace.end_s - trace.start_s
    return np.bincount(trace.program.rank, lengths, trace.program.ranks).astype(np.float64)


def makespan_s(trace: Trace) -> float:
    """Last end minus first start over all ranks' compute, in seconds."""
    return float(trace.end_s.max() - trace.start_s.min())


def bubble_fraction(trace: Trace) -> float:
    """Sum of the ranks' bubbles over p times the makespan; 0 if the makespan is 0."""
    total = trace.program.ranks * trace.makespan_s
    return float((total - trace.compute_s.sum()) / total) if total > 0 else 0.0
