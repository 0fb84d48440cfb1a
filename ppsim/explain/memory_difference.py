"""Memory difference: where a prediction and a measurement of the same program first hold different bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppsim.trace.trace import Trace

_COUNTED = {
    "activation_bytes": "activations",
    "receive_buffer_bytes": "receive buffers",
    "gradient_bytes": "gradients",
    "unsharded_bytes": "whole parameters",
    "host_bytes": "activations in host memory",
}


def first_difference(predicted: Trace, measured: Trace) -> dict[str, Any] | None:
    """The first row, or rank, at which two traces of one program hold different bytes.

    Parameters
    ----------
    predicted, measured : Trace
        Two traces of one program.

    Returns
    -------
    dict, or None if they are equal wherever both are known
        Keys column, rank, action (None for parameters), predicted, measured.

    Notes
    -----
    Compared are activations (on devices and in host memory), receive buffers, gradients and whole parameters of sharded
    stages row by row, and parameters. Unfinished sends are not: when a message has left depends on the clock.
    """
    program = predicted.program
    for name, column in _COUNTED.items():
        ours, theirs = getattr(predicted, name), getattr(measured, name)
        if ours is None or theirs is None:
            continue
        rows = np.flatnonzero(ours != theirs)
        if len(rows):
            row = int(rows[0])
            return {
                "column": column,
                "rank": int(program.rank[row]),
                "action": str(program.action_of(row)),
                "predicted": int(ours[row]),
                "measured": int(theirs[row]),
            }
    if predicted.parameter_bytes is not None and measured.parameter_bytes is not None:
        for rank in np.flatnonzero(predicted.parameter_bytes != measured.parameter_bytes).tolist():
            return {
                "column": "parameters",
                "rank": rank,
                "action": None,
                "predicted": int(predicted.parameter_bytes[rank]),
                "measured": int(measured.parameter_bytes[rank]),
            }
    return None
