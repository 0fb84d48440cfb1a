"""Schedule: who computes what, in which order. A value that both clocks run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, checked
from ppsim.errors import InputError, ScheduleError
from ppsim.schedule import csv_text
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.communication import posts_of_table, posts_when_sent
from ppsim.schedule.lowering import lower
from ppsim.schedule.offload import Offload, check_offload, placed_offload
from ppsim.schedule.order import Order
from ppsim.schedule.placed import PlacedError, check_fits_orders
from ppsim.schedule.posts import Posts
from ppsim.schedule.program import Program
from ppsim.schedule.recomputation import chosen_parts, with_recomputation
from ppsim.schedule.sharding import (
    Sharding,
    check_sharding,
    placed_sharding,
    split_actions,
    with_entries_between,
)
from ppsim.schedule.streams import Streams
from ppsim.shown import shown_by

if TYPE_CHECKING:
    import plotly.graph_objects as go


Mask = npt.NDArray[np.bool_]
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
    copies : int
        Copies of the model that the ranks hold: 1, or 2 where microbatches go in both directions. With S stages in each
        copy, stage k of the model is stage k of the first copy and stage S + k of the second. Each microbatch passes
        through one copy, the one whose stages compute it.
    communication : tuple of p Posts, or None
        What each rank sends and receives, and where in its order. None leaves it to be derived: each send stands after
        the action that makes it, each receive before the action that uses it. Where each link has a communicator of its
        own, receives that nobody states are posted ahead instead.
    sharding : tuple of p Sharding, or None
        When each rank gathers the parameters of its stages, lets them go, and reduces gradients (UNSHARD, RESHARD,
        REDUCE_GRAD). None: parameters stay whole, and gradients are reduced after the last one.
    offload : tuple of p Offload, or None
        When each rank moves activations to host memory and back (O, L). None: they stay.

    Notes
    -----
    Schedules are equal if they compute the same in the same order. Communication, sharding and offloading change when,
    not what, so they do not count.

    Copies of a stage add up their gradients at the end of a step. That is no action of the schedule: a trace times it
    (`Conditions.reduction`), and a real run does it.

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
    copies: int = 1
    communication: tuple[Posts, ...] | None = field(default=None, compare=False)
    sharding: tuple[Sharding, ...] | None = field(default=None, compare=False)
    offload: tuple[Offload, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_copies()
        if self.communication is not None:
            check_fits_orders("communication", self.orders, self.communication)
        if self.sharding is not None:
            check_fits_orders("sharding", self.orders, self.sharding)
            check_sharding(self.orders, self.placement, self.sharding, has_posts=self.communication is not None)
        if self.offload is not None:
            check_fits_orders("offload", self.orders, self.offload)
            check_offload(self.orders, self.offload)

    def _check_copies(self) -> None:
        """Refuse copies that the stages do not divide into, and what copies do not go with."""
        if isinstance(self.copies, bool) or self.copies < 1:
            raise ScheduleError(f"copies must be a whole number of 1 or more, got {self.copies!r}")
        if self.stages % self.copies:
            raise ScheduleError(
                f"{self.stages} stages are not {self.copies} copies of a model: give each as many, or take copies=1"
            )
        if self.copies > 1 and any(bool((entries.kind == Kind.UNSHARD).any()) for entries in self.sharding or ()):
            raise ScheduleError(
                f"the schedule has {self.copies} copies of the model and gathers parameters: sharding goes with one "
                "copy; leave UNSHARD and RESHARD out"
            )

    @classmethod
    @checked
    def of(
        cls,
        orders: Iterable[Order | Iterable[Action | OverlappedPair | str]],
        *,
        name: str = "custom",
        copies: int = 1,
    ) -> Schedule:
        """A schedule from each rank's actions; placement and number of microbatches follow from them.

        Parameters
        ----------
        orders : iterable of p orders
            Each an Order, or actions, or their spellings such as "0F0". Sends and receives (0SEND_F0) may stand among
            the actions, either all that the computations need or none, and are kept where they stand. So are
            sharding (0UNSHARD, 0RESHARD, 0REDUCE_GRAD) and offloading (0O0, 0L0).
        name : str
            For titles.
        copies : int
            Copies of the model; see `Schedule`.

        Raises
        ------
        ScheduleError
            If there is no action, a stage computes on two ranks, a stage between 0 and the last has no action, or
            the sends and receives are not those that the computations need, each on its side of what it serves; or if
            a stage is gathered twice, let go while it is not whole, or computed with then, or if its gradients are
            reduced twice or before the last one; or if activations are moved twice, not brought back, or missing where
            they are needed.

        Examples
        --------
        >>> Schedule.of([["0F0", "0F1", "0SEND_F0", "0SEND_F1"], ["1RECV_F0", "1F0", "1RECV_F1", "1F1"]]).to_csv()
        '0F0,0F1\\n1F0,1F1\\n'
        """
        split = [
            (order, Posts(), Sharding(), Offload()) if isinstance(order, Order) else split_actions(order)
            for order in orders
        ]
        return cls._of_parts(split, name, copies)

    @classmethod
    def _of_parts(cls, split: Sequence[tuple[Order, Posts, Sharding, Offload]], name: str, copies: int) -> Schedule:
        """From what each rank computes, posts, shards and offloads."""
        columns = (tuple(column) for column in zip(*split, strict=True)) if split else ((),) * 4
        orders, communication, sharding, offload = columns
        found = cls._of_orders(orders, name, copies)._having(communication)
        if any(len(moves) for moves in offload):
            found = replace(found, offload=offload)
        if not any(len(entries) for entries in sharding):
            return found
        if found.communication is not None:  # a rank without posts has no places among them
            sharding = tuple(entries.among_posts() for entries in sharding)
        return replace(found, sharding=sharding)

    @classmethod
    def _of_orders(cls, ranks: tuple[Order, ...], name: str, copies: int) -> Schedule:
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
            copies=copies,
        )

    def _having(self, communication: tuple[Posts, ...]) -> Schedule:
        """The schedule with this communication, once it is known to be what the computations need."""
        if not any(len(posts) for posts in communication):
            return self
        stated = replace(self, communication=communication)
        stated.program  # noqa: B018  (making it checks)
        return stated

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
        sharding = None
        if self.sharding is not None:
            sharding = tuple(entries.without_places_among_posts() for entries in self.sharding)
        plain = replace(self, communication=None, sharding=sharding)
        if place == "derived":
            return plain
        plain.check()
        program = plain.program
        if place == "late":
            return plain._having(posts_of_table(program, program.posts))
        communication, sharding = posts_when_sent(program, sharding)
        placed = plain._having(communication)
        return placed if sharding is None else replace(placed, sharding=sharding)

    @checked
    def with_sharding(self, active_stages: int | None = 3) -> Schedule:
        """The same computations, with parameters gathered and let go, and gradients reduced, by PyTorch's rule.

        Parameters
        ----------
        active_stages : int or None
            How many stages a rank keeps whole: the next ones that it computes. 1 gathers a stage when it computes next,
            more gather ahead, and as many as a rank has gather each stage once. None: no sharding is stated.

        Raises
        ------
        InputError
            If `active_stages` is below 1.
        ScheduleError
            If the schedule has several copies of the model.

        Notes
        -----
        See `ppsim.schedule.sharding.placed_sharding`. PyTorch's runtime takes 3.

        Examples
        --------
        >>> schedule = Schedule.of([["0F0", "1F0", "1B0", "0B0"]])
        >>> print(schedule.with_sharding(1).to_csv(sharding=True), end="")
        0UNSHARD,0F0,0RESHARD,1UNSHARD,1F0,1B0,1REDUCE_GRAD,1RESHARD,0UNSHARD,0B0,0REDUCE_GRAD,0RESHARD
        """
        if active_stages is None:
            return replace(self, sharding=None)
        if active_stages < 1:
            raise InputError(f"active_stages must be 1 or more, or None for no sharding, got {active_stages}")
        return replace(
            self, sharding=tuple(placed_sharding(order, self.microbatches, active_stages) for order in self.orders)
        )

    @checked
    def with_recompute(
        self,
        stages: Sequence[int] | None = None,
        *,
        microbatches: Sequence[int] | None = None,
        share: float = 1.0,
    ) -> Schedule:
        """The same computations, with some forwards computed once more (R) right before their backward.

        Parameters
        ----------
        stages : sequence of int, optional
            Whose forwards. By default those of all stages.
        microbatches : sequence of int, optional
            Of which microbatches. By default of all.
        share : float
            How many of these, from 0 to 1, rounded down and spread evenly.

        Raises
        ------
        InputError
            For a stage or microbatch that there is not, or another share.

        Notes
        -----
        Between F and R a microbatch holds `StageCost.kept_bytes` instead of its activations. R counts as compute, and
        runs while its rank waits for the gradient. PyTorch's pipelining does not know R. An R that is there already
        stays where it stands.

        Examples
        --------
        >>> Schedule.of([["0F0", "0F1", "0B0", "0B1"]]).with_recompute(microbatches=[1]).to_csv()
        '0F0,0F1,0B0,0R1,0B1\\n'
        """
        chosen = chosen_parts(self.stages, self.microbatches, stages, microbatches, share)
        for order in self.orders:
            again = order.kind == Kind.R
            chosen[order.stage[again], order.microbatch[again]] = False
        made = [
            with_recomputation(order, np.isin(order.kind, (Kind.B, Kind.I)) & chosen[order.stage, order.microbatch])
            for order in self.orders
        ]
        places = [place for _, place in made]
        return replace(
            self,
            orders=tuple(order for order, _ in made),
            communication=self.communication
            and tuple(posts.moved(place) for posts, place in zip(self.communication, places, strict=True)),
            sharding=self.sharding
            and tuple(entries.moved(place) for entries, place in zip(self.sharding, places, strict=True)),
            offload=self.offload
            and tuple(moves.moved(place) for moves, place in zip(self.offload, places, strict=True)),
        )

    @checked
    def with_offload(
        self,
        stages: Sequence[int] | None = None,
        *,
        microbatches: Sequence[int] | None = None,
        share: float = 1.0,
        ahead: int = 1,
    ) -> Schedule:
        """The same computations, with some activations moved to host memory after their F (O), and back in time (L).

        Parameters
        ----------
        stages, microbatches, share
            Whose activations, as in `with_recompute`. A share of 0: nobody's.
        ahead : int
            How many actions before the B or I (or R) that needs them activations start to come back.

        Raises
        ------
        InputError
            For a stage or microbatch that there is not, another share, or `ahead` below 1.

        Notes
        -----
        What is needed so soon that no action lies between both copies stays where it is. How fast copies are is said by
        `Conditions.host_link`. PyTorch's pipelining does not know O and L. Those that the schedule states are replaced.

        Examples
        --------
        Half of the activations, offloaded at no cost in time, where a copy takes no longer than the computation that it
        runs under (Wan et al., 2025, "PipeOffload"):

        >>> from ppsim import HostLink, StageCost, build_schedule, simulate
        >>> cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8)
        >>> plain = build_schedule("interleaved-1f1b", ranks=4, microbatches=8)
        >>> moved = plain.with_offload(share=0.5)
        >>> before, after = (simulate(s, [cost] * 8, host_link=HostLink(bytes_per_s=8.0)) for s in (plain, moved))
        >>> before.makespan_s == after.makespan_s
        True
        >>> before.peak_activation_bytes.tolist(), after.peak_activation_bytes.tolist()
        ([88, 72, 56, 40], [56, 48, 40, 32])
        """
        if ahead < 1:
            raise InputError(f"ahead must be 1 or more, got {ahead}")
        chosen = chosen_parts(self.stages, self.microbatches, stages, microbatches, share)
        offload = tuple(placed_offload(order, chosen, ahead) for order in self.orders)
        return replace(self, offload=offload if any(len(moves) for moves in offload) else None)

    @property
    def ranks(self) -> int:
        """Number of ranks, p."""
        return len(self.orders)

    @property
    def stages(self) -> int:
        """Number of stages, p times v, of all copies of the model."""
        return len(self.placement)

    @property
    def model_stages(self) -> int:
        """Number of stages that one copy of the model has."""
        return self.stages // self.copies

    @cached_property
    def routes(self) -> npt.NDArray[np.int32]:
        """The copy of the model that each microbatch passes through, shape (m,).

        Raises
        ------
        ScheduleError
            If the schedule is incomplete, or out of order on some rank.
        """
        found = np.zeros(self.microbatches, np.int32)
        found[self.program.microbatch] = self.program.stage // self.model_stages
        return found

    @cached_property
    def is_forward_only(self) -> bool:
        """True if no rank computes a backward: an evaluation pass."""
        return all(bool((order.kind == Kind.F).all()) for order in self.orders)

    def forward_only(self) -> Schedule:
        """The same schedule without its backwards, as an evaluation runs it."""
        forwards = tuple(order.take(order.kind == Kind.F) for order in self.orders)
        forward_posts = [np.isin(posts.kind, (Kind.SEND_F, Kind.RECV_F)) for posts in self.communication or ()]
        communication, sharding, _ = self._left(
            actions=[order.kind[order.starts] == Kind.F for order in self.orders],
            posts=forward_posts,
            sharding=[entries.kind != Kind.REDUCE_GRAD for entries in self.sharding or ()],
        )
        return replace(
            self,
            orders=forwards,
            communication=communication,
            sharding=sharding,
            offload=None,
            name=f"{self.name} (forward only)",
        )

    def _left(
        self, *, actions: Sequence[Mask], posts: Sequence[Mask], sharding: Sequence[Mask]
    ) -> tuple[tuple[Posts, ...] | None, tuple[Sharding, ...] | None, tuple[Offload, ...] | None]:
        """Communication and sharding where masks say what stays, rank by rank, and all O and L."""
        communication = entries = moves = None
        if self.communication is not None:
            columns = zip(self.communication, posts, actions, strict=True)
            communication = tuple(each.take(is_kept, kept) for each, is_kept, kept in columns)
        if self.sharding is not None:
            among = posts if self.communication is not None else [None] * self.ranks
            rows = zip(self.sharding, sharding, actions, among, strict=True)
            entries = tuple(each.kept_among(is_kept, kept, left) for each, is_kept, kept, left in rows)
        if self.offload is not None:
            moves = tuple(
                each.take(np.ones(len(each), bool), kept) for each, kept in zip(self.offload, actions, strict=True)
            )
        return communication, entries, moves

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
        communication, sharding, offload = self._left(
            actions=[
                ~(np.isin(order.stage[order.starts], stages) & (order.kind[order.starts] == Kind.W))
                for order in self.orders
            ],
            posts=[np.ones(len(posts), bool) for posts in self.communication or ()],
            sharding=[
                ~(np.isin(entries.stage, stages) & (entries.kind == Kind.REDUCE_GRAD))
                for entries in self.sharding or ()
            ],
        )
        return replace(self, orders=tuple(orders), communication=communication, sharding=sharding, offload=offload)

    @cached_property
    def program(self) -> Program:
        """The lowered form: all orders as flat tables, and the messages between ranks.

        Raises
        ------
        ScheduleError
            If the schedule is incomplete, or out of order on some rank.
        """
        tables = lower(self.orders, self.placement, self.microbatches, self.communication, self.copies)
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
            evaluation and complete too), or has two R; if two copies of the model compute one microbatch; if an action
            comes before one of its own rank that it needs; or if an action waits, through other ranks and
            communicators, for itself. The message shows the circle.
        InputError
            For other streams.
        """
        try:
            self.program.execution_order  # noqa: B018  (finding a sequence is the proof)
        except ScheduleError as error:
            if self.copies > 1 or not self._could_be_two_copies():
                raise
            raise ScheduleError(f"{error}. Its stages are those of 2 copies of one model: give copies=2") from None
        if streams != "link":
            self.program.message_graph(streams)

    def _could_be_two_copies(self) -> bool:
        """Whether nothing is wrong if the stages are those of two copies of a model, of which a file says nothing."""
        try:
            replace(self, copies=2).program.execution_order  # noqa: B018
        except ScheduleError:
            return False
        return True

    @checked
    def to_csv(self, *, messages: bool = False, sharding: bool = False, offload: bool = False) -> str:
        """The schedule as CSV in PyTorch's format, a row per rank and a cell per action.

        Parameters
        ----------
        messages : bool
            Add communication as PyTorch's runtime runs it ("compute_comms"): sends and receives where the schedule
            states them, else receives before and sends after the action they serve; and the sharding that the schedule
            states, else REDUCE_GRAD after the last backward of each stage.
        sharding : bool
            Add the sharding that the schedule states.
        offload : bool
            Add what the schedule moves to host memory and back. PyTorch does not read that, nor R.

        Raises
        ------
        ScheduleError
            With `messages`, for a schedule that is incomplete or out of order.
        """
        rows: list[list[Action | OverlappedPair]] = []
        for rank, order in enumerate(self.orders):
            actions = self.program.order_with_messages(rank) if messages else list(order)
            if self.sharding is not None and (messages or sharding):
                entries = self.sharding[rank] if messages else self.sharding[rank].without_places_among_posts()
                actions = with_entries_between(actions, entries)
            elif messages:
                actions = csv_text.with_reductions(actions)
            if offload and self.offload is not None:
                actions = with_entries_between(actions, self.offload[rank])
            rows.append(actions)
        return csv_text.write_rows(rows)

    @classmethod
    @checked
    def from_csv(cls, text: str, *, name: str = "custom", copies: int = 1) -> Schedule:
        """Read a schedule in PyTorch's format; an empty cell is idle.

        Parameters
        ----------
        text : str
            A row per rank, a cell per action. A text that holds any send or receive must hold all of them, each send
            after what it sends, each receive before what it serves, and keeps them where they stand. So it does with
            UNSHARD, RESHARD and REDUCE_GRAD: a stage that is gathered anywhere must be whole wherever it computes, and
            its gradients are reduced after its last backward. O and L keep their places among computations.
        name : str
            For titles.
        copies : int
            Copies of the model, of which the format says nothing; see `Schedule`.

        Raises
        ------
        ScheduleError
            Names row, column and cell, counted from 1.
        """
        return schedule_of_cells(csv_text.read_cells(text), name, copies)

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
        stages = f"{self.stages} stages" if self.copies == 1 else f"{self.copies} x {self.model_stages} stages"
        return f"{self.name}: {self.ranks} ranks, {stages}, {self.microbatches} microbatches"


def schedule_of_cells(ranks: Sequence[Sequence[csv_text.Cell]], name: str, copies: int = 1) -> Schedule:
    """A schedule from the cells of its text.

    Parameters
    ----------
    ranks : sequence of p sequences of Cell
        Those of each rank that hold something.
    name : str
        For titles.
    copies : int
        Copies of the model; see `Schedule`.

    Returns
    -------
    Schedule

    Raises
    ------
    ScheduleError
        As `Schedule.from_csv`.
    """
    try:
        return Schedule._of_parts([split_actions(cell.action for cell in cells) for cells in ranks], name, copies)
    except PlacedError as error:
        raise csv_text.located(error, ranks) from None
