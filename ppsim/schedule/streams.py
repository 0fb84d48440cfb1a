"""Streams: the communicators that carry a program's messages, and what each message waits for on them.

A rank's sends and receives are posted where they stand in its order, and nobody waits in a post. A communicator runs
what is posted on it at one end one after another. So every order is fixed before the step: the step is a graph of
actions and messages, and it hangs exactly when this graph has a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError, ScheduleError
from ppsim.schedule.program_tables import PostTable, ProgramTables

Integers = npt.NDArray[np.integer]
Streams = Literal["link", "pair", "rank"]
"""Who has a communicator: each directed link, each pair of ranks, or each rank for all that it sends and receives."""


class MessageGraph(NamedTuple):
    """What each message waits for, and the sequence in which all actions and messages can run.

    It is a tuple because compiled passes take it as it is.

    Parameters
    ----------
    send_after, receive_after : arrays of shape (messages,)
        The action after which each message's send and its receive are posted; -1 for before the rank's first.
    ahead_sending, ahead_receiving : arrays of shape (messages,)
        The message before it on its sender's and on its receiver's communicator; -1 for none.
    order : array of shape (actions + messages,)
        Action a as a, message k as actions + k, each after all that it waits for.

    Notes
    -----
    With "link" a receive that no file states is posted ahead of the step, so it waits for nothing of its own. Both ends
    of a link run its messages in one order, so what is ahead at the sender is ahead at the receiver.
    """

    send_after: Integers
    receive_after: Integers
    ahead_sending: Integers
    ahead_receiving: Integers
    order: Integers

    @classmethod
    def of(cls, program: ProgramTables, streams: Streams) -> MessageGraph:
        """The graph of a program on these communicators.

        Raises
        ------
        InputError
            For other streams.
        ScheduleError
            If some action or message waits, through others, for itself. The message shows the circle.
        """
        check_streams(streams)
        waits = _Waits.of(program, program.posts, streams)
        order = _Sequence(program, waits, streams).order()
        return cls(
            send_after=waits.send_after,
            receive_after=waits.receive_after,
            ahead_sending=waits.ahead_sending,
            ahead_receiving=waits.ahead_receiving,
            order=order,
        )

    @classmethod
    def none(cls) -> MessageGraph:
        """The graph of no messages, which stands for a program whose messages leave as they are made."""
        return cls(*(np.zeros(0, np.int32) for _ in cls._fields))


def check_streams(streams: str) -> None:
    """Raise InputError for streams that there are not."""
    if streams not in get_args(Streams):
        raise InputError(f"streams must be one of {', '.join(get_args(Streams))}, got {streams!r}")


@dataclass(frozen=True, slots=True)
class _Waits:
    """As `MessageGraph`, without the sequence."""

    send_after: Integers
    receive_after: Integers
    ahead_sending: Integers
    ahead_receiving: Integers

    @classmethod
    def of(cls, program: ProgramTables, posts: PostTable, streams: Streams) -> _Waits:
        messages = program.messages
        first = program.rank_actions[posts.rank]
        after = np.where(posts.before > first, posts.before - 1, -1)
        send_after, receive_after = _by_message(posts, after)
        if streams == "link":
            none = np.full(len(messages), -1, np.int32)
            is_posted_ahead = program.written is None
            before = np.where(messages.position > 0, np.arange(len(messages)) - 1, -1).astype(np.int32)
            return cls(send_after, none if is_posted_ahead else receive_after, before, none)
        peer = np.where(posts.sends, messages.destination[posts.message], messages.source[posts.message])
        end = posts.rank.astype(np.int64) * program.ranks + (peer if streams == "pair" else 0)
        by_end = np.argsort(end, kind="stable")
        follows = np.flatnonzero(np.diff(end[by_end]) == 0)
        ahead = np.full(len(posts), -1, np.int32)
        ahead[by_end[follows + 1]] = posts.message[by_end[follows]]
        return cls(send_after, receive_after, *_by_message(posts, ahead))


def _by_message(posts: PostTable, column: Integers) -> list[npt.NDArray[np.int32]]:
    """What a column says of each message's send, and of its receive."""
    found = []
    for is_end in (posts.sends, ~posts.sends):
        of_message = np.empty(len(posts) // 2, np.int32)
        of_message[posts.message[is_end]] = column[is_end]
        found.append(of_message)
    return found


class _Sequence:
    """Finds a sequence in which all actions and messages can run, or the circle that forbids one."""

    def __init__(self, program: ProgramTables, waits: _Waits, streams: Streams) -> None:
        self._program, self._streams, self._actions = program, streams, program.actions
        edges = [*_edges_to_actions(program), *_edges_to_messages(program, waits)]
        self._before = np.concatenate([before for before, _ in edges])
        self._behind = np.concatenate([behind for _, behind in edges])
        self._waits = waits

    def order(self) -> npt.NDArray[np.int32]:
        """All nodes, each after those that it waits for. Raises ScheduleError where there is a circle."""
        count = self._actions + len(self._program.messages)
        missing = np.bincount(self._behind, minlength=count).tolist()
        by_before = np.argsort(self._before, kind="stable")
        followers = self._behind[by_before].tolist()
        begins = np.searchsorted(self._before[by_before], np.arange(count + 1)).tolist()
        ready = [node for node in range(count) if not missing[node]]
        order: list[int] = []
        while ready:
            node = ready.pop()
            order.append(node)
            for follower in followers[begins[node] : begins[node + 1]]:
                missing[follower] -= 1
                if not missing[follower]:
                    ready.append(follower)
        if len(order) < count:
            is_done = np.zeros(count, bool)
            is_done[order] = True
            raise ScheduleError(self._circle(is_done))
        return np.array(order, np.int32)

    def _circle(self, is_done: npt.NDArray[np.bool_]) -> str:
        """Follow who waits for whom from a node that cannot run until one repeats, and say it."""
        is_stuck = ~is_done[self._before]
        waits_for = dict(zip(self._behind[is_stuck].tolist(), self._before[is_stuck].tolist(), strict=True))
        stuck_actions = np.flatnonzero(~is_done[: self._actions])
        held_at: dict[int, int] = {}  # rank -> the first action that cannot run
        for action in stuck_actions.tolist():
            first = held_at.setdefault(self._rank(action), action)
            if action != first:
                waits_for[action] = first
        path: list[int] = []
        node = next(iter(waits_for))
        while node not in path:
            path.append(node)
            node = waits_for[node]
        circle = path[path.index(node) :]
        said = [self._said(behind, before) for behind, before in zip(circle, [*circle[1:], circle[0]], strict=True)]
        remedy = (
            "Move one of these earlier or later"
            if self._streams == "link"
            else f"Take schedule.with_communication('early'), which hangs on no streams; move one of these; or give "
            f"other streams than {self._streams!r}"
        )
        return f"the schedule would wait for ever: {'; '.join(said)}. {remedy}"

    def _said(self, behind: int, before: int) -> str:
        """Why one node waits for another."""
        program, messages, actions = self._program, self._program.messages, self._actions
        if behind < actions:
            rank, action = self._rank(behind), self._spelled(behind)
            if before >= actions:
                received = program.message_action(before - actions, sending=False)
                return f"rank {rank} at {action} waits for {received}"
            verb = "runs {} after" if before < behind else "at {} waits for its own"
            return f"rank {rank} {verb.format(action)} {self._spelled(before)}"
        message = behind - actions
        ends = (
            (True, messages.source, self._waits.ahead_sending),
            (False, messages.destination, self._waits.ahead_receiving),
        )
        for is_send, rank_of, ahead in ends:
            post, rank = program.message_action(message, sending=is_send), int(rank_of[message])
            if before >= actions and ahead[message] == before - actions:
                front = program.message_action(before - actions, sending=int(messages.source[before - actions]) == rank)
                return f"rank {rank}'s {post} stands behind {front} on its {self._name(message, is_send)}"
            if before < actions and self._rank(before) == rank:
                return f"rank {rank} posts {post} after {self._spelled(before)}"
        raise RuntimeError("a message waits for what is no part of its ends")

    def _name(self, message: int, is_send: bool) -> str:
        """The communicator of one end of a message."""
        messages = self._program.messages
        if self._streams == "rank":
            return "communicator"
        peer = messages.destination[message] if is_send else messages.source[message]
        return f"{'link to' if self._streams == 'link' else 'communicator with'} rank {peer}"

    def _rank(self, action: int) -> int:
        return int(self._program.rank[self._program.action_start[action]])

    def _spelled(self, action: int) -> str:
        program = self._program
        rows: Sequence[int] = range(int(program.action_start[action]), int(program.action_start[action + 1]))
        return " and ".join(str(program.action_of(row)) for row in rows)


_Edges = list[tuple[Integers, Integers]]


def _edges_to_actions(program: ProgramTables) -> _Edges:
    """(before, behind) for what actions wait for: the action before, a result on their rank, a message."""
    actions = np.arange(program.actions)
    follows = np.ones(program.actions, bool)
    follows[program.rank_actions[:-1][np.diff(program.rank_actions) > 0]] = False
    local = np.flatnonzero((program.needs >= 0) & (program.message_in < 0))
    brought = np.flatnonzero(program.message_in >= 0)
    return [
        (actions[follows] - 1, actions[follows]),
        (program.row_action[program.needs[local]], program.row_action[local]),
        (program.actions + program.message_in[brought], program.row_action[brought]),
    ]


def _edges_to_messages(program: ProgramTables, waits: _Waits) -> _Edges:
    """(before, behind) for what messages wait for: their posts, and the messages ahead at both ends."""
    index: Integers = program.actions + np.arange(len(program.messages))
    found: _Edges = []
    for column, offset in (
        (waits.send_after, 0),
        (waits.receive_after, 0),
        (waits.ahead_sending, program.actions),
        (waits.ahead_receiving, program.actions),
    ):
        has_one = column >= 0
        found.append((column[has_one] + offset, index[has_one]))
    return found
