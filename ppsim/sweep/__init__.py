"""Sweep: a function over a grid of configurations, on any executor, its results kept in SQLite."""

from ppsim.sweep.result import SweepResult, SweepRow, load_sweep
from ppsim.sweep.run import sweep

__all__ = ["SweepResult", "SweepRow", "load_sweep", "sweep"]
