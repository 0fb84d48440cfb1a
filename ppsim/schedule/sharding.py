"""Sharding: when a rank makes the parameters of its stages whole, lets them go, and reduces their gradients.

With parameters sharded over data-parallel replicas (FSDP, ZeRO), a replica holds a share of each. UNSHARD gathers a
stage's parameters from all replicas, RESHARD keeps the share alone, and REDUCE_GRAD adds up the gradients and leaves
each replica its share:

    0UNSHARD 2UNSHARD 0F0 0F1 2F0 ... 2B1 2REDUCE_GRAD 2RESHARD 0B1 0REDUCE_GRAD 0RESHARD
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked, shown
from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.offload import COPY_KINDS, Offload
from ppsim.schedule.order import Order
from ppsim.schedule.placed import Placed, PlacedError
from ppsim.schedule.posts import MESSAGE_KINDS, SENDS, Posts

Cell = Action | OverlappedPair
SHARDING_KINDS = (Kind.REDUCE_GRAD, Kind.UNSHARD, Kind.RESHARD)


class Sharding(Placed):
    """A rank's UNSHARD, RESHARD and REDUCE_GRAD, in their sequence. Immutable.

    Parameters
    ----------
    before : array of shape (entries,)
        The action of the rank's order that each stands before, counted from 0; the number of actions for those that
        stand after the last. It never falls.
    stage, kind : arrays of shape (entries,)
        What each does, as in `Action`.
    posted : array of shape (entries,), or None
        How many of the rank's stated sends and receives stand before each. None: after the sends that follow an action,
        and before the receives of the next.

    Raises
    ------
    ScheduleError
        For columns of different lengths, numbers that 32 bits do not hold, other kinds, and places that fall.

    Examples
    --------
    >>> Sharding([0, 2, 2], 0, [Kind.UNSHARD, Kind.REDUCE_GRAD, Kind.RESHARD])
    Sharding(0:0UNSHARD 2:0REDUCE_GRAD 2:0RESHARD)
    """

    __slots__ = ("posted",)

    _columns = ("before", "stage", "kind", "posted")
    _kinds = SHARDING_KINDS
    _noun = "an entry"

    posted: npt.NDArray[np.int32] | None

    def __init__(
        self,
        before: npt.ArrayLike = (),
        stage: npt.ArrayLike = (),
        kind: npt.ArrayLike = (),
        posted: npt.ArrayLike | None = None,
    ) -> None:
        self.posted = None
        places = {} if posted is None else {"posted": posted}
        super().__init__(before=before, stage=stage, kind=kind, **places)
        if self.posted is not None and (np.diff(self.posted) < 0).any():
            raise ScheduleError(
                f"posted must be a number for each of {len(self)} entries that never falls, got {shown(posted)}"
            )

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        columns = (self.before.tolist(), self.stage.tolist(), self.kind.tolist())
        return ((before, Action(stage, Kind(kind), None)) for before, stage, kind in zip(*columns, strict=True))

    def without_places_among_posts(self) -> Sharding:
        """The same entries, placed by rule among sends and receives."""
        return Sharding(self.before, self.stage, self.kind)

    def among_posts(self) -> Sharding:
        """The same entries on a rank without posts where other ranks have some."""
        return self if self.posted is not None else Sharding(self.before, self.stage, self.kind, self.before * 0)

    def kept_among(
        self,
        is_kept: npt.NDArray[np.bool_],
        actions_kept: npt.NDArray[np.bool_],
        posts_kept: npt.NDArray[np.bool_] | None = None,
    ) -> Sharding:
        """Some of the entries, among some of the actions and posts; masks as of `Placed.take`."""
        left = self.take(is_kept, actions_kept)
        if left.posted is None or posts_kept is None:
            return left
        place = np.concatenate([[0], np.cumsum(posts_kept)])
        return Sharding(left.before, left.stage, left.kind, place[left.posted])


class ShardingError(PlacedError):
    """What is wrong with the sharding of one rank. `index` says which of its entries."""


@checked
def split_actions(actions: Iterable[Action | OverlappedPair | str]) -> tuple[Order, Posts, Sharding, Offload]:
    """Part a rank's actions into what it computes, what it sends and receives between, its sharding, and its copies.

    Parameters
    ----------
    actions : iterable of Action, OverlappedPair or str
        In sequence; a str spells an action.

    Returns
    -------
    Order, Posts, Sharding, Offload
        The computations, and the others with their places among them.

    Raises
    ------
    ScheduleError
        For a str that spells no action.

    Examples
    --------
    >>> split_actions(["0UNSHARD", "0F0", "0SEND_F0", "0RECV_B0", "0B0"])
    (Order(0F0 0B0), Posts(1:0SEND_F0 1:0RECV_B0), Sharding(0:0UNSHARD), Offload())
    """
    computed: list[Cell] = []
    posted: list[tuple[int, int, int, int]] = []
    sharded: list[tuple[int, int, int, int]] = []
    copied: list[tuple[int, int, int, int]] = []
    for entry in actions:
        action = parse_action(entry) if isinstance(entry, str) else entry
        if isinstance(action, Action) and action.kind in MESSAGE_KINDS and action.microbatch is not None:
            posted.append((len(computed), action.stage, int(action.kind), action.microbatch))
        elif isinstance(action, Action) and action.kind in SHARDING_KINDS:
            sharded.append((len(computed), action.stage, int(action.kind), len(posted)))
        elif isinstance(action, Action) and action.kind in COPY_KINDS and action.microbatch is not None:
            copied.append((len(computed), action.stage, int(action.kind), action.microbatch))
        else:
            computed.append(action)
    before, stage, kind, places = zip(*sharded, strict=True) if sharded else ((), (), (), ())
    return (
        Order.of(computed),
        Posts(*zip(*posted, strict=True)),
        Sharding(before, stage, kind, places if posted else None),
        Offload(*zip(*copied, strict=True)),
    )


def with_entries_between(actions: Sequence[Cell], placed: Sharding | Offload) -> list[Cell]:
    """A rank's actions, and what stands among them already, with its sharding or its copies where they stand."""
    entries = list(placed)
    posted_before = placed.posted if isinstance(placed, Sharding) else None
    places = None if posted_before is None else posted_before.tolist()
    result: list[Cell] = []
    at = computed = posted = 0
    for action in [*actions, None]:
        kind = action.kind if isinstance(action, Action) else None
        while at < len(entries) and entries[at][0] <= computed:
            is_behind = kind in SENDS if places is None else kind in MESSAGE_KINDS and places[at] > posted
            if is_behind:
                break
            result.append(entries[at][1])
            at += 1
        if action is not None:
            result.append(action)
            posted += kind in MESSAGE_KINDS
            computed += kind is None or kind.computes
    return result


def check_sharding(
    orders: Sequence[Order], placement: Sequence[int], sharding: Sequence[Sharding], *, has_posts: bool
) -> None:
    """Check that every entry makes sense where it stands.

    Raises
    ------
    ShardingError
        If one is of a stage of another rank; if a stage is gathered that is whole, or let go that is not; if some
        stages are gathered and one computes that is not whole; if a reduction occurs twice, or before the stage's last
        gradient.
    """
    is_gathered = any(bool((entries.kind == Kind.UNSHARD).any()) for entries in sharding)
    for rank, (order, entries) in enumerate(zip(orders, sharding, strict=True)):
        if entries.posted is not None and not has_posts:
            raise ScheduleError(f"rank {rank}: sharding has places among posts, but no communication is stated")
        for index, (_, action) in enumerate(entries):
            if action.stage >= len(placement) or placement[action.stage] != rank:
                raise ShardingError(
                    rank, index, f"{action} is on rank {rank}, which does not hold stage {action.stage}: move it there"
                )
        row_action = np.repeat(np.arange(len(order)), np.diff([*order.starts.tolist(), len(order.stage)]))
        for stage in np.unique(np.concatenate([order.stage, entries.stage])).tolist():
            _check_stage(rank, stage, order, row_action, entries, is_gathered=is_gathered)


def _check_stage(
    rank: int,
    stage: int,
    order: Order,
    row_action: npt.NDArray[np.int64],
    entries: Sharding,
    *,
    is_gathered: bool,
) -> None:
    """As `check_sharding`, for one stage."""
    parts = np.flatnonzero(order.stage == stage)
    used = row_action[parts]
    of_stage = np.flatnonzero(entries.stage == stage)
    reductions = of_stage[entries.kind[of_stage] == Kind.REDUCE_GRAD]
    last = max(used[np.isin(order.kind[parts], (Kind.B, Kind.W))], default=-1)
    if len(reductions) and entries.before[reductions[0]] <= last:
        raise ShardingError(
            rank,
            int(reductions[0]),
            f"{stage}REDUCE_GRAD comes before the last backward of stage {stage}: put it after that",
        )
    if len(reductions) > 1:
        raise ShardingError(rank, int(reductions[1]), f"{stage}REDUCE_GRAD occurs twice: keep one")

    changes = of_stage[entries.kind[of_stage] != Kind.REDUCE_GRAD]
    wanted = np.where(np.arange(len(changes)) % 2 == 0, Kind.UNSHARD, Kind.RESHARD)
    wrong = np.flatnonzero(entries.kind[changes] != wanted)
    if len(wrong):
        index = int(changes[wrong[0]])
        found, other = (Action(stage, Kind(kind), None) for kind in (entries.kind[index], wanted[wrong[0]]))
        state = "whole already" if found.kind == Kind.UNSHARD else "not whole"
        raise ShardingError(
            rank, index, f"{found} stands where stage {stage} is {state}: put {other} before it, or leave it out"
        )
    if is_gathered:
        gathered = np.searchsorted(entries.before[changes], used, side="right")
        bare = np.flatnonzero(gathered % 2 == 0)
        if len(bare):
            needing = order[int(used[bare[0]])]
            raise ShardingError(
                rank, None, f"{needing} needs stage {stage} whole: put {stage}UNSHARD before it, or leave all out"
            )


def placed_sharding(order: Order, microbatches: int, active_stages: int) -> Sharding:
    """Place a rank's sharding by PyTorch's rule.

    Parameters
    ----------
    order : Order
        What the rank computes.
    microbatches : int
        How many gradients a stage adds up.
    active_stages : int
        How many stages are whole at once: those that compute next.

    Returns
    -------
    Sharding
        Before each action the stages that are not among the next ones are let go, and those among them that are not
        whole are gathered in the sequence of their use. A stage's gradients are reduced after its last gradient.

    Notes
    -----
    The rule is that of `_add_unshard_reshard` and `_add_reduce_grad` in torch 2.13 (torch.distributed.pipelining). A
    pair that is met when one place is left brings both its stages.
    """
    stages = np.unique(order.stage).tolist()
    uses = {stage: np.flatnonzero(order.stage == stage).tolist() for stage in stages}
    met = dict.fromkeys(stages, 0)  # how many of its uses have been
    gradients = dict.fromkeys(stages, 0)
    active: set[int] = set()  # what is let go at one time goes in the sequence of a set, as theirs does
    found: list[tuple[int, int, Kind]] = []
    kinds, of_part, joined = order.kind.tolist(), order.stage.tolist(), order.joined.tolist()
    starts = [*order.starts.tolist(), len(of_part)]
    for action, (first, end) in enumerate(pairwise(starts)):
        coming = sorted((uses[stage][met[stage]], stage) for stage in stages if met[stage] < len(uses[stage]))
        count = active_stages
        if len(coming) > count and joined[coming[count - 1][0]] and coming[count][0] == coming[count - 1][0] + 1:
            count += 1
        following = [stage for _, stage in coming[:count]]
        for stage in [stage for stage in active if stage not in following]:
            active.remove(stage)
            found.append((action, stage, Kind.RESHARD))
        for stage in following:
            if stage not in active:
                active.add(stage)
                found.append((action, stage, Kind.UNSHARD))
        for part in range(first, end):
            stage = of_part[part]
            met[stage] += 1
            gradients[stage] += kinds[part] in (Kind.B, Kind.W)
            if kinds[part] in (Kind.B, Kind.W) and gradients[stage] == microbatches:
                found.append((action + 1, stage, Kind.REDUCE_GRAD))
    found += [(len(order), stage, Kind.RESHARD) for stage in active]
    before, stage_column, kind_column = zip(*found, strict=True) if found else ((), (), ())
    return Sharding(before, stage_column, kind_column)
