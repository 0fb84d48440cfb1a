"""Deadlock check: whether a program can end, and how far ahead receives must be posted for that.

A rank runs its actions in sequence, and nobody waits in a send. So a program hangs exactly when the graph of "comes
after on this rank" and "needs the result of" has a circle. The check lets all ranks advance as far as they can. The
sequence in which the actions ran is the proof that the program ends; where ranks are stuck, following who waits for
whom leads into the circle.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.program_tables import Integers, Post, ProgramTables

_FEW_RANKS = 8  # up to these, running one action after the other is faster than waves of all ranks


def execution_order(program: ProgramTables) -> npt.NDArray[np.int32]:
    """All actions in one sequence in which each comes after everything it needs.

    Parameters
    ----------
    program : ProgramTables
        What is to run.

    Returns
    -------
    array of shape (actions,)
        The numbers of the actions.

    Raises
    ------
    ScheduleError
        If some action waits, through others, for itself. The message shows the circle.
    """
    order = _advance(program)
    circle = _circle_after(program, order)
    if circle is not None:
        raise ScheduleError(circle.message)
    return order


class Circle(NamedTuple):
    """Actions, and where they are posted messages too, that wait for each other.

    Parameters
    ----------
    message : str
        Who waits for whom, and the remedy.
    waiting : tuple of int and Post
        The rows, and the sends and receives, that wait; each for the next one, or for what keeps that.
    """

    message: str
    waiting: tuple[int | Post, ...]


def find_circle(program: ProgramTables) -> Circle | None:
    """The circle in which a program's actions wait for each other; None for a program that ends."""
    return _circle_after(program, _advance(program))


def _advance(program: ProgramTables) -> npt.NDArray[np.int32]:
    """As many actions as can run, each after everything it needs."""
    return _one_by_one(program) if program.ranks <= _FEW_RANKS else _in_waves(program)


def _circle_after(program: ProgramTables, order: npt.NDArray[np.int32]) -> Circle | None:
    """The circle in which the ranks are stuck once these actions have run; None if all have."""
    if len(order) == program.actions:
        return None
    position = program.rank_actions[:-1] + np.bincount(_rank_of(program, order), minlength=program.ranks)
    stuck = np.flatnonzero(position < program.rank_actions[1:])
    return _circle(program, position.tolist(), int(stuck[0]))


def _rank_of(program: ProgramTables, actions: npt.NDArray[np.int32]) -> Integers:
    return program.rank[program.action_start[actions]]


def _needed_actions(program: ProgramTables) -> list[Integers]:
    """The action that each action needs by its first and, where there are pairs, by its last row; -1 for none."""
    if not program.has_pairs:
        return [program.needs]
    needed = np.where(program.needs >= 0, program.row_action[program.needs], -1)
    return [needed[program.action_start[:-1]], needed[program.action_start[1:] - 1]]


def _in_waves(program: ProgramTables) -> npt.NDArray[np.int32]:
    """In each wave, every rank whose next action has what it needs runs that action."""
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


def _one_by_one(program: ProgramTables) -> npt.NDArray[np.int32]:
    """Each rank runs until it lacks a result, and goes on once that result is there."""
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


def _circle(program: ProgramTables, position: list[int], rank: int) -> Circle:
    """The circle that is met by following who waits for whom from a stuck rank until a rank repeats."""
    steps: dict[int, tuple[str, int]] = {}
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
        said = f"rank {rank} at {program.action_of(row)} waits for {program.action_of(need)}{behind}"
        steps[rank] = (said, row)
        rank = holder
    names = list(steps)
    circle = [steps[name] for name in names[names.index(rank) :]]
    waits = "; ".join(said for said, _ in circle)
    return Circle(
        f"the schedule would wait for ever: {waits}. Move one of these actions earlier or later",
        tuple(row for _, row in circle),
    )


def _is_pending(program: ProgramTables, position: list[int], row: int) -> bool:
    return int(program.row_action[row]) >= position[int(program.rank[row])]


def smallest_receive_window(program: ProgramTables) -> int:
    """How many receives of one link must be posted and not yet used at once, so that no rank waits for ever.

    Parameters
    ----------
    program : ProgramTables
        What is to run.

    Returns
    -------
    int
        The smallest window with which the program ends: 1 if every link's messages are used one by one in the order in
        which the link carries them, 0 if there are no messages.

    Notes
    -----
    A receiver posts its receives in the order in which the link carries them, and may use them in another order. To
    use the message at position k it must have posted k + 1 receives, those used before among them. With j messages used
    before, and k the latest position so far, k + 1 - j are posted and not yet used. An overlapped pair that takes two
    messages from one link uses neither before both are there.
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
