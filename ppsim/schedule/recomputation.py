"""Recomputation: where an R stands in an order, right before the backward that it serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.schedule.action import Kind
from ppsim.schedule.order import Order


def with_recomputation(order: Order, is_chosen: npt.NDArray[np.bool_]) -> tuple[Order, npt.NDArray[np.int64]]:
    """The order with an R right before the action of each chosen part.

    Parameters
    ----------
    order : Order
        What a rank computes.
    is_chosen : array of shape (parts,)
        Which parts are recomputed for: each a B or an I, alone or in a pair.

    Returns
    -------
    order : Order
        With an R of their stage and microbatch.
    place : array of shape (actions + 1,)
        The place of what stood before each action, and after the last: before the R of that action, if there is one.

    Examples
    --------
    >>> with_recomputation(Order.of(["0F0", "0F1", "0B0", "0B1"]), np.array([False, False, False, True]))
    (Order(0F0 0F1 0B0 0R1 0B1), array([0, 1, 2, 3, 5]))
    """
    parts = np.flatnonzero(is_chosen)
    actions = np.searchsorted(order.starts, parts, side="right") - 1
    at = order.starts[actions]
    columns = {
        "stage": order.stage[parts],
        "kind": np.full(len(parts), Kind.R),
        "microbatch": order.microbatch[parts],
        "joined": np.zeros(len(parts), bool),
    }
    again = Order(*(np.insert(getattr(order, name), at, values) for name, values in columns.items()))
    inserted = np.bincount(actions, minlength=len(order) + 1)
    return again, np.arange(len(order) + 1) + np.cumsum(inserted) - inserted


def spread_evenly(count: int, share: float) -> npt.NDArray[np.bool_]:
    """A share of so many things, rounded down, as far from one another as can be.

    >>> spread_evenly(4, 0.5).tolist()
    [False, True, False, True]
    """
    reached = np.floor(np.arange(count + 1) * share)
    chosen: npt.NDArray[np.bool_] = np.diff(reached) > 0
    return chosen


def chosen_parts(
    stages: int,
    microbatches: int,
    of_stages: Sequence[int] | None,
    of_microbatches: Sequence[int] | None,
    share: float,
) -> npt.NDArray[np.bool_]:
    """Stages and microbatches that a rule is for, shape (stages, microbatches).

    Parameters
    ----------
    stages, microbatches : int
        How many there are.
    of_stages, of_microbatches : sequence of int or None
        Those that the rule is for; None: all.
    share : float
        How many of these microbatches, from 0 to 1, as `spread_evenly`.

    Raises
    ------
    InputError
        For a stage or microbatch that there is not, or another share.

    Examples
    --------
    >>> chosen_parts(2, 4, [1], None, 0.5).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 0, 1]]
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be from 0 to 1, got {share!r}")
    chosen = np.zeros((stages, microbatches), bool)
    rows = _numbers("stage", of_stages, stages)
    columns = np.unique(_numbers("microbatch", of_microbatches, microbatches))
    chosen[np.ix_(rows, columns[spread_evenly(len(columns), share)])] = True
    return chosen


def _numbers(what: str, given: Sequence[int] | None, count: int) -> npt.NDArray[np.int64]:
    """Numbers of stages or microbatches, all by default. Raises InputError for one that there is not."""
    numbers = np.arange(count) if given is None else np.asarray(list(given), np.int64)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise InputError(f"{what} {wrong} is not there: there are {count}, counted from 0")
    return numbers
