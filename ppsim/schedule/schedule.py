"""Schedule: who computes what, in which order. A value that both clocks run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from ppsim.checks import check_fields, checked
from ppsim.errors import InputError, ScheduleError
from ppsim.schedule import csv_text
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.communication import posts_when_sent
from ppsim.schedule.lowering import lower
from ppsim.schedule.order import Order
from ppsim.schedule.posts import PostError, Posts, check_lengths, split_posts
from ppsim.schedule.program import Program
from ppsim.schedule.program_tables import PostTable
from ppsim.schedule.streams import Streams
from ppsim.shown import shown_by

if TYPE_CHECKING:
    import plotly.graph_objects as go


Communication = Literal["as-given", "early", "late", "derived"]
"""Where receives are posted: as the schedule states them; early, when the message is sent; late, at their use; or
derived, as where a schedule states none."""


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
    communication : tuple of p Posts, or None
        What each rank sends and receives, and where in its order. None leaves it to be derived: each send stands after
        the action that makes it, each receive before the action that uses it. Where each link has a communicator of its
        own, receives that nobody states are posted ahead instead.

    Notes
    -----
    Schedules are equal if they compute the same in the same order. Communication changes when, not what, so it does not
    count.

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
    communication: tuple[Posts, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.communication is not None:
            check_lengths(self.orders, self.communication)

    @classmethod
    @checked
    def of(cls, orders: Iterable[Order | Iterable[Action | OverlappedPair | str]], *, name: str = "custom") -> Schedule:
        """A schedule from each rank's actions; placement and number of microbatches follow from them.

        Parameters
        ----------
        orders : iterable of p orders
            Each an Order, or actions, or their spellings such as "0F0". Sends and receives (0SEND_F0) may stand among
            the actions, either all that the computations need or none, and are kept where they stand.
        name : str
            For titles.

        Raises
        ------
        ScheduleError
            If there is no action, a stage computes on two ranks, a stage between 0 and the last has no action, or
            the sends and receives are not those that the computations need, each on its side of what it serves.

        Examples
        --------
        >>> Schedule.of([["0F0", "0F1", "0SEND_F0", "0SEND_F1"], ["1RECV_F0", "1F0", "1RECV_F1", "1F1"]]).to_csv()
        '0F0,0F1\\n1F0,1F1\\n'
        """
        split = [(order, Posts()) if isinstance(order, Order) else split_posts(order) for order in orders]
        return cls._of_orders(tuple(order for order, _ in split), name)._having(tuple(posts for _, posts in split))

    @classmethod
    def _of_orders(cls, ranks: tuple[Order, ...], name: str) -> Schedule:
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

    def _having(self, communication: tuple[Posts, ...]) -> Schedule:
        """The schedule with this communication, once it is known to be what the computations need."""
        if not any(len(posts) for posts in communication):
            return self
        stated = replace(self, communication=communication)
        stated.program  # noqa: B018  (making it checks)
        return stated

    def _posts_of(self, table: PostTable) -> tuple[Posts, ...]:
        """A table of this schedule's program as posts of each rank."""
        before = table.before - self.program.rank_actions[table.rank]
        columns = before, *self.program.post_columns(table.message, table.sends)
        bounds = np.searchsorted(table.rank, np.arange(self.ranks + 1)).tolist()
        return tuple(Posts(*(column[begin:end] for column in columns)) for begin, end in pairwise(bounds))

    @checked
    def with_communication(self, place: Communication) -> Schedule:
        """The same computations, with each send after what makes it and receives placed by rule.

        Parameters
        ----------
        place : "as-given", "early", "late" or "derived"
            "as-given": nothing changes. "early": a receive is posted when the message is sent, in one sequence of all
            ranks. No streams hang with that, but a receive that is posted long before its message can be sent keeps
            what stands behind it waiting. "late": it stands before the action that uses it. "derived": none is stated.

        Raises
        ------
        ScheduleError
            If the schedule is incomplete, or hangs whatever carries its messages.

        Notes
        -----
        "early" is where PyTorch's pipelining places receives (`_add_send_recv` in torch 2.13).

        Examples
        --------
        >>> schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]])
        >>> schedule.check("rank")
        Traceback (most recent call last):
        ppsim.errors.ScheduleError: the schedule would wait for ever: ...
        >>> schedule.with_communication("early").check("rank")
        """
        if place == "as-given":
            return self
        plain = replace(self, communication=None)
        if place == "derived":
            return plain
        plain.check()
        program = plain.program
        return plain._having(plain._posts_of(program.posts if place == "late" else posts_when_sent(program)))

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
        forwards = tuple(order.take(order.kind == Kind.F) for order in self.orders)
        communication = None
        if self.communication is not None:
            communication = tuple(
                posts.take(np.isin(posts.kind, (Kind.SEND_F, Kind.RECV_F)), order.kind[order.starts] == Kind.F)
                for posts, order in zip(self.communication, self.orders, strict=True)
            )
        return replace(self, orders=forwards, communication=communication, name=f"{self.name} (forward only)")

    @checked
    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    @checked
    def with_frozen_stages(self, stages: Sequence[int]) -> Schedule:
        """The same schedule where all parameters of some stages are frozen, so that these have no W.

        Parameters
        ----------
        stages : sequence of int
            Their split backwards become B, which is I alone: give their costs `backward_weight_s=0`.

        Raises
        ------
        InputError
            For a stage that there is not.

        Examples
        --------
        >>> Schedule.of([["0F0", "0I0", "0W0"]]).with_frozen_stages([0]).to_csv()
        '0F0,0B0\\n'
        """
        unknown = [stage for stage in stages if not 0 <= stage < self.stages]
        if unknown:
            raise InputError(f"stage {unknown[0]} is not there to be frozen: there are {self.stages}, counted from 0")
        orders = []
        for order in self.orders:
            is_frozen = np.isin(order.stage, stages)
            kind = np.where(is_frozen & (order.kind == Kind.I), Kind.B, order.kind)
            kept = ~(is_frozen & (order.kind == Kind.W))
            orders.append(Order(order.stage[kept], kind[kept], order.microbatch[kept], order.joined[kept]))
        communication = None
        if self.communication is not None:
            communication = tuple(
                posts.take(
                    np.ones(len(posts), bool),
                    ~(np.isin(order.stage[order.starts], stages) & (order.kind[order.starts] == Kind.W)),
                )
                for posts, order in zip(self.communication, self.orders, strict=True)
            )
        return replace(self, orders=tuple(orders), communication=communication)

    @cached_property
    def program(self) -> Program:
        """The lowered form: all orders as flat tables, and the messages between ranks.

        Raises
        ------
        ScheduleError
            If the schedule is incomplete, or out of order on some rank.
        """
        tables = lower(self.orders, self.placement, self.microbatches, self.communication)
        return Program(schedule=self, **vars(tables))

    @checked
    def check(self, streams: Streams = "link") -> None:
        """Check that the schedule is complete, in order, and cannot hang.

        Parameters
        ----------
        streams : "link", "pair" or "rank"
            What has a communicator of its own: each directed link, each pair of ranks, or each rank. A communicator
            runs what is posted on it one after another, each when both ends have reached it.

        Raises
        ------
        ScheduleError
            If some (stage, microbatch) has not one F and either one B, or one I and one W (forwards alone are an
            evaluation and complete too); if an action comes before one of its own rank that it needs; or if an action
            waits, through other ranks and communicators, for itself. The message shows the circle.
        InputError
            For other streams.
        """
        # Finding a sequence is the proof.
        self.program.execution_order  # noqa: B018
        if streams != "link":
            self.program.message_graph(streams)

    @checked
    def to_csv(self, *, messages: bool = False) -> str:
        """The schedule as CSV in PyTorch's format, a row per rank and a cell per action.

        Parameters
        ----------
        messages : bool
            Add communication as PyTorch's runtime runs it ("compute_comms"): sends and receives where the schedule
            states them, else receives before and sends after the action they serve; and REDUCE_GRAD after the last
            backward of each stage.

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
            after what it sends, each receive before what it serves, and keeps them where they stand. REDUCE_GRAD comes
            after its stage's last backward. It is checked and then left out; so are UNSHARD and RESHARD.
        name : str
            For titles.

        Raises
        ------
        ScheduleError
            Names row, column and cell, counted from 1.
        """
        return schedule_of_cells(csv_text.read_cells(text), name)

    @checked
    def plot(self, *, critical_path: bool = False) -> go.Figure:
        """The schedule as a figure, with F = I = W = 1, B = 2 and free messages.

        Parameters
        ----------
        critical_path : bool
            Whether to draw the critical path as a red line.

        Returns
        -------
        plotly.graph_objects.Figure

        Raises
        ------
        ScheduleError
            If the schedule is incomplete or could hang.
        """
        found: go.Figure = shown_by("schedule_figure", self, critical_path=critical_path)
        return found

    def _repr_html_(self) -> str:
        return str(shown_by("schedule_html", self))

    def __str__(self) -> str:
        return f"{self.name}: {self.ranks} ranks, {self.stages} stages, {self.microbatches} microbatches"


def schedule_of_cells(ranks: Sequence[Sequence[csv_text.Cell]], name: str) -> Schedule:
    """A schedule from the cells of its text.

    Parameters
    ----------
    ranks : sequence of p sequences of Cell
        Those of each rank that hold something.
    name : str
        For titles.

    Returns
    -------
    Schedule

    Raises
    ------
    ScheduleError
        As `Schedule.from_csv`.
    """
    split = [split_posts(cell.action for cell in cells if not cell.is_of_stage) for cells in ranks]
    computed = Schedule._of_orders(tuple(order for order, _ in split), name)
    csv_text.check_whole_stages(ranks, computed.placement)
    try:
        return computed._having(tuple(posts for _, posts in split))
    except PostError as error:
        raise csv_text.located(error, ranks) from None


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
