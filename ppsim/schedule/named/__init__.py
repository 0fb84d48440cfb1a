"""Named schedules: published schedules, one function each, and the registry that knows them by name.

A function writes the order of one rank, or the orders of all ranks where the rule sees them all at once.
"""

from ppsim.schedule.named.registry import build_schedule, register

__all__ = ["build_schedule", "register"]
