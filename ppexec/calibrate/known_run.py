"""Known runs: schedules whose actions take a known time, run beside what is to be predicted.

What their steps take beyond the known times is what running a schedule costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ppsim import Schedule, StageCost, build_schedule

_LEAST_MICROBATCHES = 8
_MOST_SIZES = 3


@dataclass(frozen=True)
class KnownRun:
    """One schedule with equal stages.

    Parameters
    ----------
    schedule_name : str
        As `ppsim.build_schedule` takes it.
    ranks, stages_per_rank : int
        Its size.
    size_bytes : int
        Of each message.
    action_s : float
        Seconds of a stage's forward, and of each half of its backward.
    is_busy : bool
        Whether an action keeps a core busy for that time, instead of waiting.
    """

    schedule_name: str
    ranks: int
    stages_per_rank: int
    size_bytes: int
    action_s: float
    is_busy: bool = False

    @cached_property
    def schedule(self) -> Schedule:
        """Its schedule, with 8 microbatches or more, a multiple of the ranks."""
        return build_schedule(
            self.schedule_name,
            ranks=self.ranks,
            microbatches=self.ranks * -(-_LEAST_MICROBATCHES // self.ranks),
            stages_per_rank=self.stages_per_rank,
        )

    @cached_property
    def stages(self) -> list[StageCost]:
        """The cost of each stage."""
        cost = StageCost(
            forward_s=self.action_s,
            backward_input_s=self.action_s,
            backward_weight_s=self.action_s,
            activation_bytes=0,
            weight_activation_bytes=0,
            output_bytes=self.size_bytes,
        )
        return [cost] * self.schedule.stages


def known_runs(
    ranks: int, message_bytes: Sequence[int], action_s: float, *, stages_per_rank: int = 1, with_busy: bool = False
) -> list[KnownRun]:
    """The known runs that calibrate a run of these ranks.

    Parameters
    ----------
    ranks, stages_per_rank : int
        Of the run to predict.
    message_bytes : sequence of int
        Sizes of its messages. Of more than three sizes the smallest, the middle and the largest are taken.
    action_s : float
        Seconds of each action.
    with_busy : bool
        Add each known run with actions that keep cores busy, which shows what sharing cores costs.

    Returns
    -------
    list of KnownRun
        Two schedules for each size; one schedule for a single rank.

    Notes
    -----
    In 1F1B all ranks act at the same time and wait for each other's messages. In a schedule with split backwards they
    act at different times, and most messages arrive before they are needed. A run to predict has both.
    """
    sizes = sorted(set(message_bytes)) if ranks > 1 else [0]
    if len(sizes) > _MOST_SIZES:
        sizes = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    names = ("1f1b", "zb-h1") if stages_per_rank == 1 else ("interleaved-1f1b", "zb-v")
    return [
        KnownRun(name, ranks, 2 if name == "zb-v" else stages_per_rank, size, action_s, is_busy)
        for name in names[: min(ranks, 2)]
        for size in sizes
        for is_busy in (False, True)[: 1 + with_busy]
    ]
