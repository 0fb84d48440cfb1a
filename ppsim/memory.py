"""Memory: the activation bytes a rank holds, from its order alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.action import Kind
from ppsim.costs import StageCost
from ppsim.errors import CostError
from ppsim.program import Program


def activation_levels(program: Program, stages: Sequence[StageCost]) -> npt.NDArray[np.int64]:
    """Activation bytes that a row's rank holds once the row's action has taken effect, shape (rows,).

    F takes the stage's `activation_bytes` at its start, B releases them at its end; I leaves
    `weight_activation_bytes` of them at its end and W releases those. An overlapped pair takes effect at its end, so
    both its rows have the level after the pair. In an evaluation nothing outlives its F: all levels are 0.
    Raises CostError for sums that 64 bits do not hold.
    """
    if program.schedule.is_forward_only:
        return np.zeros(len(program.stage), np.int64)
    whole = np.array([stage.activation_bytes for stage in stages], np.int64)
    kept = np.array([stage.weight_activation_bytes for stage in stages], np.int64)
    if program.schedule.microbatches * sum(map(int, np.maximum(whole, kept))) >= 2**63:
        raise CostError("the activations of all microbatches exceed 2**63 bytes: give smaller activation_bytes")
    change = np.zeros((4, len(stages)), np.int64)
    change[Kind.F], change[Kind.B], change[Kind.I], change[Kind.W] = whole, -whole, kept - whole, -kept
    total = np.cumsum(change[program.kind, program.stage])
    last_row = program.action_start[1:] - 1
    level = total[last_row][program.row_action]
    first_row = program.action_start[program.rank_actions[:-1]]
    before_rank = np.where(first_row > 0, total[np.maximum(first_row - 1, 0)], 0)
    return level - before_rank[program.rank]


def peak_per_rank(program: Program, levels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The largest level on each rank between its actions, shape (p,); 0 for a rank without actions."""
    peak = np.zeros(program.ranks, np.int64)
    np.maximum.at(peak, program.rank, levels)
    return peak
