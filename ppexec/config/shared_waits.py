"""Shared waits: whether replicas with different numbers of microbatches can gather and reduce parameters together."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import ppsim

_Moment = tuple[Any, ...]
"""An action, (replica, number), or a collective of all replicas, ("rank r", how many came before it, spelling)."""


def wait_alike(pipelines: Sequence[ppsim.Schedule]) -> bool:
    """Whether replicas with these schedules can run their collectives together.

    Parameters
    ----------
    pipelines : sequence of Schedule
        With sharding, and the same stages on the same ranks.

    Returns
    -------
    bool
        True if each rank has the same UNSHARD and REDUCE_GRAD in the same sequence in all of them, and no rank waits
        for itself by way of others.

    Notes
    -----
    A rank waits at a collective until that rank of every replica is there; messages pass within a replica. Gatherings
    start ahead of their use in truth, so a rank waits less than here.
    """
    graph: TopologicalSorter[_Moment] = TopologicalSorter()
    found = []
    for replica, schedule in enumerate({id(each): each for each in pipelines}.values()):
        program = schedule.program
        lines = [_moments(program, replica, rank) for rank in range(schedule.ranks)]
        found.append([_collectives(line) for line in lines])
        for line in lines:
            for before, after in pairwise(line):
                graph.add(after, before)
        action = program.row_action.tolist()
        for row, needed in enumerate(program.needs.tolist()):
            if needed >= 0 and action[row] != action[needed]:
                graph.add((replica, action[row]), (replica, action[needed]))
    try:
        graph.prepare()
    except CycleError:
        return False
    return all(each == found[0] for each in found)


def _moments(program: ppsim.Program, replica: int, rank: int) -> list[_Moment]:
    """What a rank of a replica does, in sequence."""
    moments: list[_Moment] = [
        (replica, action) for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1]))
    ]
    stated = [(place, each) for place, each in (program.schedule.sharding or ())[rank] if each.kind in _SHARED]
    for count, (place, each) in enumerate(stated):
        moments.insert(place + count, (f"rank {rank}", count, str(each)))
    return moments


_SHARED = (ppsim.Kind.UNSHARD, ppsim.Kind.REDUCE_GRAD)


def _collectives(moments: Sequence[_Moment]) -> list[_Moment]:
    return [moment for moment in moments if isinstance(moment[0], str)]
