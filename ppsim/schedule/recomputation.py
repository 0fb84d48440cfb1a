"""Recomputation: where an R stands in an order, right before the backward that it serves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
