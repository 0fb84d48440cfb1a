"""Named: schedules by name, with numbers that they allow."""

from __future__ import annotations

from itertools import product
from typing import Any

import ppsim
from ppsim.schedule.named.registry import natural_stages_per_rank, schedule_copies, unmet_requirement

ONE_WAY = [name for name in ppsim.schedule_names() if schedule_copies(name) == 1]
BOTH_WAYS = [name for name in ppsim.schedule_names() if schedule_copies(name) > 1]


def allowed(name: str, ranks: int, microbatches: int) -> tuple[int, int]:
    """The smallest numbers that a schedule allows from these on: those in both directions need even ones."""
    v = natural_stages_per_rank(name)
    tries = product(range(ranks, ranks + 2), range(microbatches, microbatches + 3))
    return next((p, m) for p, m in tries if unmet_requirement(name, p, m, v) is None)


def built(name: str, *, ranks: int, microbatches: int, **more: Any) -> ppsim.Schedule:
    """The schedule with the numbers that it allows."""
    ranks, microbatches = allowed(name, ranks, microbatches)
    return ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches, **more)
