"""Exercise: a known schedule of known actions, run beside what is to be predicted, to see what running costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from ppexec.models.batch import Batch
from ppexec.models.shapes import TensorSpec
from ppexec.stage.timed import TimedStage, burn_s, sharpen_sleep, wait_s
from ppexec.transport.choice import Carriers
from ppexec.workers.runtime import Runtime, StepRecord
from ppsim import Program, Schedule, StageCost, build_schedule
from ppsim.schedule.deadlock import smallest_receive_window

_LEAST_MICROBATCHES = 8
_MOST_SIZES = 3


@dataclass(frozen=True)
class Exercise:
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


def exercises(
    ranks: int, message_bytes: Sequence[int], action_s: float, *, stages_per_rank: int = 1, with_busy: bool = False
) -> list[Exercise]:
    """Exercises to be run in turn: two schedules with messages of every size, or smallest, middle and largest of many.

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
        Exercise(name, ranks, 2 if name == "zb-v" else stages_per_rank, size, action_s, is_busy)
        for name in names[: min(ranks, 2)]
        for size in sizes
        for is_busy in (False, True)[: 1 + with_busy]
    ]


class Gym:
    """One rank's end of exercises, in the world of what is measured beside them.

    window: receives posted ahead on each link, as in the run; more where an exercise needs them, 0 for no limit.
    """

    def __init__(self, group: dist.ProcessGroup, *, window: int, timeout_s: float, device: torch.device) -> None:
        self._group, self._window, self._timeout_s, self._device = group, window, timeout_s, device
        self._runtimes: dict[Exercise, Runtime] = {}
        sharpen_sleep()

    def prepare(self, exercise: Exercise) -> None:
        """Build what it needs, the first time. Collective."""
        if exercise in self._runtimes:
            return
        program, rank = exercise.schedule.program, dist.get_rank(self._group)
        window = max(self._window, smallest_receive_window(program)) if self._window else 0
        carriers = Carriers(self._group, window=window, timeout_s=self._timeout_s, device=self._device)
        transport = carriers.open(program, message_specs(program, exercise.stages))
        stages = timed_stages(
            exercise.schedule.stages_of(rank),
            exercise.stages,
            trains=True,
            spend=burn_s if exercise.is_busy else wait_s,
        )
        self._runtimes[exercise] = Runtime(program, rank, stages, transport)

    def step(self, exercise: Exercise) -> StepRecord:
        """Run one step."""
        return self._runtimes[exercise].step(Batch())


def timed_stages(
    held: Sequence[int], costs: Sequence[StageCost], *, trains: bool, spend: Callable[[float], None] = wait_s
) -> Mapping[int, TimedStage]:
    """The stages of one rank that take their time without computing."""
    return {
        stage: TimedStage(
            stage,
            costs[stage],
            before=costs[stage - 1] if stage else None,
            is_last=stage == len(costs) - 1,
            trains=trains,
            spend=spend,
        )
        for stage in held
    }


def message_specs(program: Program, costs: Sequence[StageCost]) -> list[TensorSpec]:
    """What timed stages send: bytes, as many as stated."""
    producer, consumer = program.messages.producer, program.messages.consumer
    lower = [min(int(program.stage[a]), int(program.stage[b])) for a, b in zip(producer, consumer, strict=True)]
    return [TensorSpec(shape=(costs[stage].output_bytes,), dtype=torch.uint8) for stage in lower]
