"""The compiled check: how far every rank of a program gets."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from ppsim.program import Program


def advance(program: Program) -> npt.NDArray[np.int64]:
    """The action at which each rank stands when no rank can go on, shape (p,); its last plus one if it ends."""
    return _advance(program.rank_actions, program.action_start, program.needs)


@numba.njit(cache=True, nogil=True)
def _advance(rank_actions, action_start, needs):
    """A rank that meets a result not there yet leaves its name at it, and is called again when it is."""
    ranks = len(rank_actions) - 1
    position = rank_actions[:-1].copy()
    done = np.zeros(len(needs), np.bool_)
    waiter = np.full(len(needs), -1, np.int32)
    ready = np.arange(ranks)[::-1].copy()
    count = ranks
    while count:
        count -= 1
        rank = ready[count]
        action = position[rank]
        last = rank_actions[rank + 1]
        while action < last:
            missing = -1
            for row in range(action_start[action], action_start[action + 1]):
                need = needs[row]
                if need >= 0 and not done[need]:
                    missing = need
                    break
            if missing >= 0:
                waiter[missing] = rank
                break
            for row in range(action_start[action], action_start[action + 1]):
                done[row] = True
                other = waiter[row]
                if other >= 0:
                    waiter[row] = -1
                    ready[count] = other
                    count += 1
            action += 1
        position[rank] = action
    return position
