"""Schedule: who computes what, in which order. A value; two clocks run it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.order import Order

if TYPE_CHECKING:
    from ppsim.schedule.program import Program


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The orders of all ranks and where the stages live.

    orders: per rank a sequence of actions. placement: `placement[stage]` is the rank that holds the stage.
    microbatches: m, per data-parallel replica. name: how it was built, for titles only.

    A schedule whose orders hold forwards alone is an evaluation pass.
    """

    orders: tuple[Order, ...]
    placement: tuple[int, ...]
    microbatches: int
    name: str = "custom"

    @classmethod
    def of(cls, orders: Iterable[Order | Iterable[Action | OverlappedPair | str]], *, name: str = "custom") -> Schedule:
        """A schedule from each rank's actions or spellings; placement and microbatches follow from them.

        `Schedule.of([["0F0", "0B0"], ["1F0", "1B0"]])` has two ranks. Raises ScheduleError if a stage occurs on two
        ranks or a stage between 0 and the last occurs on none.
        """
        ranks = tuple(order if isinstance(order, Order) else Order.of(order) for order in orders)
        if not any(len(order) for order in ranks):
            raise ScheduleError("the schedule holds no action: give each rank its actions, as in 0F0 0B0")
        placement: dict[int, int] = {}
        for rank, order in enumerate(ranks):
            for stage in np.unique(order.stage).tolist():
                if stage in placement:
                    raise ScheduleError(
                        f"stage {stage} computes on rank {placement[stage]} and on rank {rank}: "
                        "every action of a stage must be on one rank"
                    )
                placement[stage] = rank
        stages = max(placement) + 1
        missing = next((stage for stage in range(stages) if stage not in placement), None)
        if missing is not None:
            raise ScheduleError(
                f"stage {missing} has no action, but stage {stages - 1} has: number stages without gaps"
            )
        microbatches = 1 + max(int(order.microbatch.max()) for order in ranks if len(order))
        return cls(
            orders=ranks,
            placement=tuple(placement[stage] for stage in range(stages)),
            microbatches=microbatches,
            name=name,
        )

    @property
    def ranks(self) -> int:
        """p."""
        return len(self.orders)

    @property
    def stages(self) -> int:
        """Number of stages, p times v."""
        return len(self.placement)

    @property
    def is_forward_only(self) -> bool:
        """True if no rank computes a backward: an evaluation pass."""
        return all(bool((order.kind == Kind.F).all()) for order in self.orders)

    def next_stages(self) -> npt.NDArray[np.int32]:
        """The stage that takes each stage's output, shape (stages, microbatches); -1 after the last.

        The one place that knows the route: schedules in two directions will answer by microbatch.
        """
        after = np.arange(1, self.stages + 1, dtype=np.int32)
        after[-1] = -1
        return np.broadcast_to(after[:, None], (self.stages, self.microbatches))

    def forward_only(self) -> Schedule:
        """The same schedule without its backwards, as an evaluation runs it."""
        return Schedule(
            orders=tuple(order.take(order.kind == Kind.F) for order in self.orders),
            placement=self.placement,
            microbatches=self.microbatches,
            name=f"{self.name} (forward only)",
        )

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    @cached_property
    def program(self) -> Program:
        """The lowered form that both clocks run: all orders plus the message table. Raises ScheduleError."""
        from ppsim.schedule.program import lower

        return lower(self)

    def check(self) -> None:
        """Raise ScheduleError unless the schedule is complete, in order, and cannot hang.

        Complete: every (stage, microbatch) has one F and either one B, or one I and one W (or no stage has any
        backward). In order: on each rank an action comes after what it needs from that rank. Cannot hang: across
        ranks no action waits, through others, for itself.
        """
        self.program.execution_order  # noqa: B018  (finding it is the proof)

    def to_csv(self, *, messages: bool = False) -> str:
        """PyTorch's format, a row per rank and a cell per action; `messages` adds communication (see `csv_text`)."""
        from ppsim.schedule.csv_text import write_csv

        return write_csv(self, messages=messages)

    @classmethod
    def from_csv(cls, text: str, *, name: str = "custom") -> Schedule:
        """Read PyTorch's format, with or without communication; an empty cell is idle (see `csv_text`).

        Raises ScheduleError that names row, column and cell (counted from 1).
        """
        from ppsim.schedule.csv_text import read_csv

        return read_csv(text, name=name)

    def __str__(self) -> str:
        return f"{self.name}: {self.ranks} ranks, {self.stages} stages, {self.microbatches} microbatches"


def loop_placement(ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod p."""
    return tuple(range(ranks)) * stages_per_rank


def v_placement(ranks: int, stages_per_rank: int = 2) -> tuple[int, ...]:
    """Back and forth: 0 1 2 3 3 2 1 0 for four ranks with two stages each."""
    there = tuple(range(ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (there if turn % 2 == 0 else there[::-1]))


def concatenated(orders: Sequence[Order], column: str) -> np.ndarray:
    """One column of all orders, rank after rank."""
    return np.concatenate([getattr(order, column) for order in orders])
