"""Spread lines: from when to when each action starts in a share of an ensemble's samples, drawn into a timeline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ppsim.errors import InputError
from ppsim.plots.units import Unit
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble

_RANGE = (5, 95)  # percent
_EDGES = (-0.36, 0.36)  # of a lane, from its middle: neighbours take turns, so that they can overlap
_CAP = 0.07
_INK = "rgba(20, 20, 20, 0.85)"


def spread_lines(blocks: Sequence[tuple[Trace, float, Ensemble]], unit: Unit) -> go.Scatter:
    """One broken line with a bracket for every action.

    Parameters
    ----------
    blocks : sequence
        For each trace: the trace, y of its rank 0, and the samples of its program.
    unit : Unit
        Of time.

    Raises
    ------
    InputError
        If samples are of another program than the trace.
    """
    x, y = [], []
    for trace, top, ensemble in blocks:
        program = trace.program
        if ensemble.program is not program and not all(
            np.array_equal(getattr(ensemble.program, name), getattr(program, name))
            for name in ("rank", "stage", "kind", "microbatch", "action_start")
        ):
            raise InputError("spreads need samples of the trace's own program: give its ensemble")
        first = program.action_start[:-1]
        begin_s, end_s = ensemble.start_quantiles_s(_RANGE)[:, first]
        rank = program.rank[first]
        turn = (np.arange(program.actions) - program.rank_actions[rank]) % 2
        middle = top + rank + np.asarray(_EDGES)[turn]
        nothing = np.full(len(first), np.nan)
        begin, end = begin_s * unit.scale, end_s * unit.scale
        x.append(np.stack([begin, begin, nothing, begin, end, nothing, end, end, nothing], axis=1).ravel())
        low, high = middle - _CAP, middle + _CAP
        y.append(np.stack([low, high, nothing, middle, middle, nothing, low, high, nothing], axis=1).ravel())
    return go.Scatter(
        name=f"starts, {_RANGE[0]}% to {_RANGE[1]}% of samples",
        x=np.concatenate(x),
        y=np.concatenate(y),
        mode="lines",
        line={"color": _INK, "width": 1.3},
        hoverinfo="skip",
        legendrank=1900,
    )
