"""Bubble warning: too few microbatches for the number of ranks."""

from __future__ import annotations

import ppsim


def bubble_warning(schedule: ppsim.Schedule) -> list[str]:
    """Warn of fewer than 2 p microbatches.

    Parameters
    ----------
    schedule : Schedule
        With p ranks and m microbatches.

    Returns
    -------
    list of str
        Empty, or one sentence with the bubble fraction to expect and the m that would halve it.

    Notes
    -----
    The fraction is simulated for equal stages, with I and W as long as F, and without communication. For AFAB and 1F1B
    it is (p - 1) / (m + p - 1).

    Examples
    --------
    >>> bubble_warning(ppsim.build_schedule("1f1b", ranks=2, microbatches=3))[0].partition(": ")[2]
    'expect a bubble fraction of 0.250; 7 microbatches would halve it'
    """
    if schedule.ranks == 1 or schedule.microbatches >= 2 * schedule.ranks or schedule.name == "custom":
        return []
    fraction = _bubble_fraction(schedule)
    more = None if fraction <= 0 else _halving_microbatches(schedule, fraction / 2)
    remedy = f"; {more} microbatches would halve it" if more else ""
    return [
        f"{schedule.microbatches} microbatches over {schedule.ranks} ranks are fewer than 2 x ranks = "
        f"{2 * schedule.ranks}: expect a bubble fraction of {fraction:.3f}{remedy}"
    ]


def _bubble_fraction(schedule: ppsim.Schedule) -> float:
    equal = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    return ppsim.simulate(schedule, [equal] * schedule.stages).bubble_fraction


def _halving_microbatches(schedule: ppsim.Schedule, target: float) -> int | None:
    """The smallest m whose schedule of this name has a bubble fraction of at most `target`; None if none is found."""
    if schedule.name not in ppsim.schedule_names():
        return None
    stages_per_rank = schedule.stages // schedule.ranks
    limit = 2 * schedule.microbatches + 4 * schedule.ranks
    for microbatches in range(schedule.microbatches + 1, limit + 1):
        try:
            candidate = ppsim.build_schedule(
                schedule.name, ranks=schedule.ranks, microbatches=microbatches, stages_per_rank=stages_per_rank
            )
        except ValueError:
            continue
        if _bubble_fraction(candidate) <= target + 1e-12:
            return microbatches
    return None
