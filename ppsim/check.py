"""Check: whether a program can end, and how far ahead receives must be posted for that."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ppsim.errors import ScheduleError
from ppsim.program import Program

_LARGE = 200_000  # actions


def check_ends(program: Program) -> None:
    """Raise ScheduleError if some action waits, through others, for itself; the message shows the circle.

    Every rank runs its actions in sequence and sends wait for nobody, so a program hangs exactly when the graph of
    "comes after on this rank" and "needs the result of" has a circle. Advances all ranks as far as they go.
    """
    position = _advance_large(program) if program.actions > _LARGE else _advance(program)
    ends = program.rank_actions[1:]
    stuck = [rank for rank in range(program.ranks) if position[rank] < ends[rank]]
    if stuck:
        raise ScheduleError(_circle(program, position, stuck[0]))


def _advance(program: Program) -> list[int]:
    """Run every rank as far as it gets; the action at which each one stands then."""
    needs, starts = program.needs.tolist(), program.action_start.tolist()
    position = program.rank_actions[:-1].tolist()
    ends = program.rank_actions[1:].tolist()
    done = bytearray(len(needs))
    waiting: dict[int, int] = {}  # row that is not done yet -> rank that waits for it
    ready = list(range(program.ranks))
    while ready:
        rank = ready.pop()
        action = position[rank]
        while action < ends[rank]:
            rows = range(starts[action], starts[action + 1])
            missing = next((needs[row] for row in rows if needs[row] >= 0 and not done[needs[row]]), -1)
            if missing >= 0:
                waiting[missing] = rank
                break
            for row in rows:
                done[row] = 1
                waiter = waiting.pop(row, -1)
                if waiter >= 0:
                    ready.append(waiter)
            action += 1
        position[rank] = action
    return position


def _advance_large(program: Program) -> list[int]:
    """As `_advance`, compiled; worth numba's second of importing for large programs alone."""
    from ppsim.engines.compiled_check import advance

    return advance(program).tolist()


def _circle(program: Program, position: list[int], rank: int) -> str:
    """Follow who waits for whom from a stuck rank until a rank repeats."""
    steps: dict[int, str] = {}
    while rank not in steps:
        action = position[rank]
        rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
        row, need = next(
            (row, int(program.needs[row]))
            for row in rows
            if program.needs[row] >= 0 and _is_pending(program, position, int(program.needs[row]))
        )
        holder = int(program.rank[need])
        ahead = program.row_action[need] - position[holder]
        at = program.action_of(int(program.action_start[position[holder]]))
        behind = f", which rank {holder} runs {ahead} later than the {at} it is held at" if ahead else ""
        steps[rank] = f"rank {rank} at {program.action_of(row)} waits for {program.action_of(need)}{behind}"
        rank = holder
    names = list(steps)
    circle = [steps[name] for name in names[names.index(rank) :]]
    return "the schedule would wait for ever: " + "; ".join(circle) + ". Move one of these actions earlier or later"


def _is_pending(program: Program, position: list[int], row: int) -> bool:
    return int(program.row_action[row]) >= position[int(program.rank[row])]


def smallest_receive_window(program: Program) -> int:
    """How many receives of one link must be posted and not yet used at once so that none is waited for in vain.

    A receiver posts its receives in the order in which the link carries them; it may use them in another order. When
    it needs the message at position k having used j before, k + 1 - j (at least, with the latest position so far for
    k) are posted. An overlapped pair that takes both its messages from one link uses neither before both are there.
    1 if every link is used in its own order, one message at a time; 0 if there are no messages.
    """
    messages = program.messages
    user = program.row_action[messages.consumer]
    bounds = [*np.flatnonzero(messages.position == 0).tolist(), len(messages)]  # of the links
    window = 0
    for begin, end in pairwise(bounds):
        in_use = np.lexsort((messages.position[begin:end], user[begin:end]))
        latest = np.maximum.accumulate(messages.position[begin:end][in_use])
        used_before = np.searchsorted(user[begin:end][in_use], user[begin:end][in_use], side="left")
        window = max(window, int((latest + 1 - used_before).max()))
    return window
