"""Offload: when a rank moves the activations of a microbatch to host memory (O), and back (L).

    0F0 0O0 0F1 1... 0L0 ... 0B0

Copies run beside computations: O once the action before it has ended, L likewise, each on a stream of its direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Action, Kind
from ppsim.schedule.order import Order
from ppsim.schedule.placed import PlacedError, PlacedForMicrobatches

COPY_KINDS = (Kind.O, Kind.L)


class Offload(PlacedForMicrobatches):
    """A rank's copies of activations to host memory and back, in their sequence. Immutable.

    Parameters
    ----------
    before : array of shape (copies,)
        The action of the rank's order that each stands before, counted from 0; the number of actions for those that
        stand after the last. It never falls.
    stage, kind, microbatch : arrays of shape (copies,)
        Whose activations go (O) or come back (L), as in `Action`.

    Raises
    ------
    ScheduleError
        For columns of different lengths, numbers that 32 bits do not hold, other kinds, and places that fall.

    Notes
    -----
    Among the sends, receives and sharding at the same place copies have no place of their own: none of these waits.

    Examples
    --------
    >>> Offload([1, 2], 0, [Kind.O, Kind.L], 0)
    Offload(1:0O0 2:0L0)
    """

    __slots__ = ()

    _kinds = COPY_KINDS
    _noun = "a copy"


class OffloadError(PlacedError):
    """What is wrong with the copies of one rank. `index` says which of them."""


def check_offload(orders: Sequence[Order], offload: Sequence[Offload]) -> None:
    """Check that every copy makes sense where it stands.

    Raises
    ------
    OffloadError
        If one occurs twice or without its other; if O does not stand after its F, L after its O, or the R, or else the
        B or I, that needs the activations, after L.
    """
    for rank, (order, copies) in enumerate(zip(orders, offload, strict=True)):
        if len(copies):
            _check_rank(rank, order, copies)


def _check_rank(rank: int, order: Order, copies: Offload) -> None:
    computed = {
        (int(stage), kind, int(microbatch)): action
        for kind in (Kind.F, Kind.R, Kind.B, Kind.I)
        for stage, microbatch, action in zip(*_where(order, kind), strict=True)
    }
    found: dict[Action, int] = {}
    for index, (before, copy) in enumerate(copies):
        if copy in found:
            raise OffloadError(rank, index, f"{copy} occurs twice: keep one")
        found[copy] = index
        stage, kind, microbatch = copy.stage, copy.kind, copy.microbatch
        forward = computed.get((stage, Kind.F, microbatch or 0))
        if forward is None:
            raise OffloadError(rank, index, f"{copy} is of what rank {rank} does not compute: leave it out")
        if before <= forward:
            raise OffloadError(rank, index, f"{copy} comes before {stage}F{microbatch} has ended: put it after that")
        if kind == Kind.L:
            if Action(stage, Kind.O, microbatch) not in found:
                raise OffloadError(rank, index, f"{copy} needs {stage}O{microbatch}: put that before it")
            for needing in (Kind.R, Kind.B, Kind.I):
                action = computed.get((stage, needing, microbatch or 0))
                if action is not None and before > action:
                    raise OffloadError(
                        rank, index, f"{copy} comes after {stage}{needing}{microbatch}, which needs it: put it before"
                    )
    for copy, index in found.items():
        if copy.kind == Kind.O and Action(copy.stage, Kind.L, copy.microbatch) not in found:
            raise OffloadError(
                rank, index, f"{copy} takes away what nothing brings back: add {copy.stage}L{copy.microbatch}"
            )


def _where(order: Order, kind: Kind) -> tuple[list[int], list[int], list[int]]:
    """Stages, microbatches and actions of a kind's parts."""
    parts = np.flatnonzero(order.kind == kind)
    actions = np.searchsorted(order.starts, parts, side="right") - 1
    return order.stage[parts].tolist(), order.microbatch[parts].tolist(), actions.tolist()


def placed_offload(order: Order, is_chosen: npt.NDArray[np.bool_], ahead: int) -> Offload:
    """Copies out right after each chosen forward, and back some actions before what needs it.

    Parameters
    ----------
    order : Order
        What a rank computes.
    is_chosen : array of shape (stages, microbatches)
        Whose activations. Those that are needed so soon that nothing would lie between the copies stay.
    ahead : int
        How many actions before the R, or else the B or I, L stands; 1 or more.

    Returns
    -------
    Offload

    Examples
    --------
    >>> every = np.ones((1, 3), bool)
    >>> placed_offload(Order.of(["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"]), every, 1)
    Offload(1:0O0 2:0O1 2:0L0 3:0O2 3:0L1 4:0L2)
    """
    forward, needed = np.full((2, *is_chosen.shape), -1)
    for kind in (Kind.F, Kind.B, Kind.I, Kind.R):  # R last, since it comes first
        stage, microbatch, action = _where(order, kind)
        (forward if kind == Kind.F else needed)[stage, microbatch] = action
    out, back = forward + 1, needed - ahead
    stage_of, microbatch_of = np.nonzero(is_chosen & (forward >= 0) & (needed >= 0) & (back > out))
    moved = stage_of, microbatch_of
    count = len(stage_of)
    before = np.concatenate([out[moved], back[moved]])
    kind_of = np.repeat([int(Kind.O), int(Kind.L)], count)
    in_sequence = np.lexsort((np.tile(microbatch_of, 2), np.tile(stage_of, 2), kind_of, before))
    columns = (before, np.tile(stage_of, 2), kind_of, np.tile(microbatch_of, 2))
    return Offload(*(column[in_sequence] for column in columns))
