"""Check: whether a program can end, and how far ahead receives must be posted for that."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.program import Program

_FEW = 8  # ranks up to which one action after the other is found sooner than a wave of all ranks


def execution_order(program: Program) -> npt.NDArray[np.int32]:
    """All actions in one sequence in which each comes after what it needs, shape (actions,): proof that all can run.

    Every rank runs its actions in sequence and sends wait for nobody, so a program hangs exactly when the graph of
    "comes after on this rank" and "needs the result of" has a circle. Advances all ranks as far as they go. Raises
    ScheduleError if some action waits, through others, for itself; the message shows the circle.
    """
    order = _one_by_one(program) if program.ranks <= _FEW else _in_waves(program)
    if len(order) < program.actions:
        position = program.rank_actions[:-1] + np.bincount(_rank_of(program, order), minlength=program.ranks)
        stuck = np.flatnonzero(position < program.rank_actions[1:])
        raise ScheduleError(_circle(program, position.tolist(), int(stuck[0])))
    return order


def _rank_of(program: Program, actions: npt.NDArray[np.int32]) -> npt.NDArray[np.integer]:
    return program.rank[program.action_start[actions]]


def _needed_actions(program: Program) -> list[npt.NDArray[np.integer]]:
    """The action that each action needs by its first and, where there are pairs, by its last row; -1 for none."""
    if not program.has_pairs:
        return [program.needs]
    needed = np.where(program.needs >= 0, program.row_action[program.needs], -1)
    return [needed[program.action_start[:-1]], needed[program.action_start[1:] - 1]]


def _in_waves(program: Program) -> npt.NDArray[np.int32]:
    """All ranks at once: in each wave every rank whose next action has what it needs does it."""
    needed = _needed_actions(program)
    done = np.zeros(program.actions + 1, bool)
    done[-1] = True  # where -1, "needs nothing", points
    has_actions = np.diff(program.rank_actions) > 0
    at = program.rank_actions[:-1][has_actions].astype(np.int32)
    end = program.rank_actions[1:][has_actions].astype(np.int32)
    waves = [at[:0]]
    while len(at):
        ready = done[needed[0][at]]
        for more in needed[1:]:
            ready &= done[more[at]]
        wave = at[ready]
        if not len(wave):
            break
        waves.append(wave)
        done[wave] = True
        at = at + ready
        goes_on = at < end
        if not goes_on.all():
            at, end = at[goes_on], end[goes_on]
    return np.concatenate(waves)


def _one_by_one(program: Program) -> npt.NDArray[np.int32]:
    """Each rank as far as it gets; one that lacks a result leaves its name there and goes on when it is done."""
    needed = [column.tolist() for column in _needed_actions(program)]
    first, last = needed[0], needed[-1]
    rank_of = _rank_of(program, np.arange(program.actions, dtype=np.int32)).tolist()
    ends = program.rank_actions[1:].tolist()
    done = bytearray(program.actions + 1)
    done[-1] = 1
    waiting: dict[int, list[int]] = {}  # action that is not done yet -> those that need it, two if it is a pair
    ready = [action for action, end in zip(program.rank_actions[:-1].tolist(), ends, strict=True) if action < end]
    order: list[int] = []
    while ready:
        action = ready.pop()
        end = ends[rank_of[action]]
        while action < end:
            missing = first[action] if not done[first[action]] else last[action]
            if not done[missing]:
                waiting.setdefault(missing, []).append(action)
                break
            done[action] = 1
            order.append(action)
            if action in waiting:
                ready += waiting.pop(action)
            action += 1
    return np.array(order, np.int32)


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
