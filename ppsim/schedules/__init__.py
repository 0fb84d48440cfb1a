"""The schedules of the field by name. A schedule is one function that writes one rank's order."""

from __future__ import annotations

from ppsim.schedules.afab import afab, afab_eager
from ppsim.schedules.registry import build_schedule, natural_stages_per_rank, register, schedule_names

register("afab", afab, also="gpipe")
register("afab-eager", afab_eager)

__all__ = ["build_schedule", "natural_stages_per_rank", "register", "schedule_names"]
