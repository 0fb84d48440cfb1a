"""Schedule: who computes what, in which order. A value that both clocks run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ppsim.checks import check_fields, checked
from ppsim.errors import ScheduleError
from ppsim.schedule import csv_text
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.lowering import lower
from ppsim.schedule.order import Order
from ppsim.schedule.program import Program


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The orders of all ranks, and where the stages live.

    Parameters
    ----------
    orders : tuple of p orders
        What each rank computes, in sequence. Orders of forwards alone are an evaluation pass.
    placement : tuple of ints, one per stage
        `placement[stage]` is the rank that holds the stage.
    microbatches : int
        Number of microbatches per data-parallel replica, m.
    name : str
        How the schedule was built; for titles alone.

    Examples
    --------
    >>> schedule = Schedule.of([["0F0", "0B0"], ["1F0", "1B0"]])
    >>> schedule.placement, schedule.microbatches
    ((0, 1), 1)
    """

    orders: tuple[Order, ...]
    placement: tuple[int, ...]
    microbatches: int
    name: str = "custom"

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    @checked
    def of(cls, orders: Iterable[Order | Iterable[Action | OverlappedPair | str]], *, name: str = "custom") -> Schedule:
        """A schedule from each rank's actions; placement and number of microbatches follow from them.

        Parameters
        ----------
        orders : iterable of p orders
            Each an Order, or actions, or their spellings such as "0F0".
        name : str
            For titles.

        Raises
        ------
        ScheduleError
            If there is no action, a stage computes on two ranks, or a stage between 0 and the last has no action.
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
        """Number of ranks, p."""
        return len(self.orders)

    @property
    def stages(self) -> int:
        """Number of stages, p times v."""
        return len(self.placement)

    @property
    def is_forward_only(self) -> bool:
        """True if no rank computes a backward: an evaluation pass."""
        return all(bool((order.kind == Kind.F).all()) for order in self.orders)

    def forward_only(self) -> Schedule:
        """The same schedule without its backwards, as an evaluation runs it."""
        return Schedule(
            orders=tuple(order.take(order.kind == Kind.F) for order in self.orders),
            placement=self.placement,
            microbatches=self.microbatches,
            name=f"{self.name} (forward only)",
        )

    @checked
    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    @cached_property
    def program(self) -> Program:
        """The lowered form: all orders as flat tables, and the messages between ranks.

        Raises
        ------
        ScheduleError
            If the schedule is incomplete, or out of order on some rank.
        """
        return Program(schedule=self, **vars(lower(self.orders, self.placement, self.microbatches)))

    def check(self) -> None:
        """Check that the schedule is complete, in order, and cannot hang.

        Raises
        ------
        ScheduleError
            If some (stage, microbatch) has not one F and either one B, or one I and one W (forwards alone are an
            evaluation and complete too); if an action comes before one of its own rank that it needs; or if an action
            waits, through other ranks, for itself.
        """
        self.program.execution_order  # noqa: B018  (finding it is the proof)

    @checked
    def to_csv(self, *, messages: bool = False) -> str:
        """The schedule as CSV in PyTorch's format, a row per rank and a cell per action.

        Parameters
        ----------
        messages : bool
            Add communication as PyTorch's runtime runs it ("compute_comms"): receives before and sends after the
            action they serve, and REDUCE_GRAD after the last backward of each stage.

        Raises
        ------
        ScheduleError
            With `messages`, for a schedule that is incomplete or out of order.
        """
        if not messages:
            return csv_text.write_rows(self.orders)
        return csv_text.write_rows(
            csv_text.with_reductions(self.program.order_with_messages(rank)) for rank in range(self.ranks)
        )

    @classmethod
    @checked
    def from_csv(cls, text: str, *, name: str = "custom") -> Schedule:
        """Read a schedule in PyTorch's format; an empty cell is idle.

        Parameters
        ----------
        text : str
            A row per rank, a cell per action. A text that holds any send or receive must hold all of them, each send
            after what it sends, each receive before what it serves. REDUCE_GRAD comes after its stage's last backward.
            Communication is checked and then left out, since lowering derives it; so are UNSHARD and RESHARD.
        name : str
            For titles.

        Raises
        ------
        ScheduleError
            Names row, column and cell, counted from 1.
        """
        ranks = csv_text.read_cells(text)
        schedule = cls.of(([cell.action for cell in cells if cell.computes] for cells in ranks), name=name)
        csv_text.check_whole_stages(ranks, schedule.placement)
        if csv_text.has_messages(ranks):
            csv_text.check_messages(ranks, schedule.placement, schedule.program)
        return schedule

    def __str__(self) -> str:
        return f"{self.name}: {self.ranks} ranks, {self.stages} stages, {self.microbatches} microbatches"


def loop_placement(ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod p.

    >>> loop_placement(3, 2)
    (0, 1, 2, 0, 1, 2)
    """
    return tuple(range(ranks)) * stages_per_rank


def v_placement(ranks: int, stages_per_rank: int = 2) -> tuple[int, ...]:
    """Stages back and forth over the ranks.

    >>> v_placement(4)
    (0, 1, 2, 3, 3, 2, 1, 0)
    """
    there = tuple(range(ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (there if turn % 2 == 0 else there[::-1]))
