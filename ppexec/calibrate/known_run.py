"""Known run: a schedule whose actions take a known time, run beside what is to be predicted.

What such a step takes beyond its known times is what running a schedule costs.
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

    action_s: seconds of a stage's forward, and of each half of its backward. size_bytes: of each message. is_busy:
    whether its actions keep a core at work for so long, instead of waiting.
    """

    schedule_name: str
    ranks: int
    stages_per_rank: int
    size_bytes: int
    action_s: float
    is_busy: bool = False

    @cached_property
    def schedule(self) -> Schedule:
        """Its schedule; as many microbatches as ranks, or a few times as many."""
        return build_schedule(
            self.schedule_name,
            ranks=self.ranks,
            microbatches=self.ranks * -(-_LEAST_MICROBATCHES // self.ranks),
            stages_per_rank=self.stages_per_rank,
        )

    @cached_property
    def stages(self) -> list[StageCost]:
        """What its stages take."""
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
    """Known runs, to be run in turn: two schedules with messages of every size, or of three sizes if there are more.

    In 1F1B all ranks act at the same time and wait for one another's messages; where backwards are split they act at
    different times, and most messages are there before they are needed. What is predicted is of both kinds. Ranks that
    hold several stages do so here too: they have less to do at a time, and disturb one another less. with_busy: each
    also with ranks that keep cores at work, to see what sharing these costs.
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
