"""Memory columns: what a predicted trace holds beyond what its costs say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ppsim.errors import InputError
from ppsim.simulation.memory_levels import optimizer_state_bytes, receive_levels
from ppsim.trace.trace import Trace, known


def with_columns(trace: Trace, *, receive_window: int | None = None, optimizer: str | None = None) -> Trace:
    """The trace with columns of receive buffers and of the optimizer's state.

    Parameters
    ----------
    trace : Trace
        A predicted step.
    receive_window : int, optional
        Receives posted ahead on each link.
    optimizer : str, optional
        See `memory_levels.optimizer_state_bytes`. Step counters, 4 bytes for each parameter tensor, are left out, since
        costs do not say how many tensors there are.

    Returns
    -------
    Trace

    Raises
    ------
    InputError
        For a window below 1, an unknown optimizer, or an optimizer without known gradients; for a trace that does not
        know its messages' bytes.
    """
    changes: dict[str, Any] = {}
    if receive_window is not None:
        changes["receive_buffer_bytes"] = receive_levels(
            trace.program, known(trace.message_bytes, "its messages' bytes"), receive_window
        )
    if optimizer is not None:
        trained = trace.memory.gradient_bytes
        if trained is None:
            raise InputError("an optimizer's state follows the gradients, and this trace does not know them")
        collectives = trace.conditions.collectives
        if collectives is not None and trace.reduce_bytes is not None:  # it is of each replica's share
            shares = collectives.gradient_shares(trace.reduce_bytes.tolist())
            trained = np.bincount(np.asarray(trace.schedule.placement), shares, trace.ranks).astype(np.int64)
        changes["optimizer_bytes"] = np.array(
            [optimizer_state_bytes(optimizer, int(each)) for each in trained], np.int64
        )
    return replace(trace, **changes)
