"""Streams: the communicators that carry a program's messages, and what each message waits for on them.

A rank's sends and receives are posted where they stand in its order, and nobody waits in a post. A communicator runs
what is posted on it at one end one after another. So every order is fixed before the step: the step is a graph of
actions and messages, and it hangs exactly when this graph has a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.schedule.deadlock import Circle
from ppsim.schedule.program_tables import Post, PostTable, ProgramTables

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
        ScheduleError
            If some action or message waits, through others, for itself. The message shows the circle.
        """
        waits = _waits(program, streams)
        sequence = _Sequence(program, waits, streams)
        order = sequence.advance()
        circle = sequence.circle_after(order)
        if circle is not None:
            raise ScheduleError(circle.message)
        return waits._replace(order=order)

    @classmethod
    def none(cls) -> MessageGraph:
        """The graph of no messages, which stands for a program whose messages leave as they are made."""
        return cls(*(np.zeros(0, np.int32) for _ in cls._fields))


def circle_of_posts(program: ProgramTables, streams: Streams) -> Circle | None:
    """The circle in which actions and posted messages wait for each other; None for a program that ends."""
    sequence = _Sequence(program, _waits(program, streams), streams)
    return sequence.circle_after(sequence.advance())


def _waits(program: ProgramTables, streams: Streams) -> MessageGraph:
    """The graph without its sequence."""
    messages, posts, unordered = program.messages, program.posts, np.zeros(0, np.int32)
    first = program.rank_actions[posts.rank]
    after = np.where(posts.before > first, posts.before - 1, -1)
    send_after, receive_after = _by_message(posts, after)
    if streams == "link":
        none = np.full(len(messages), -1, np.int32)
        is_posted_ahead = program.written is None
        before = np.where(messages.position > 0, np.arange(len(messages)) - 1, -1).astype(np.int32)
        return MessageGraph(send_after, none if is_posted_ahead else receive_after, before, none, unordered)
    peer = np.where(posts.sends, messages.destination[posts.message], messages.source[posts.message])
    end = posts.rank.astype(np.int64) * program.ranks + (peer if streams == "pair" else 0)
    by_end = np.argsort(end, kind="stable")
    follows = np.flatnonzero(np.diff(end[by_end]) == 0)
    ahead = np.full(len(posts), -1, np.int32)
    ahead[by_end[follows + 1]] = posts.message[by_end[follows]]
    ahead_sending, ahead_receiving = _by_message(posts, ahead)
    return MessageGraph(send_after, receive_after, ahead_sending, ahead_receiving, unordered)


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

    def __init__(self, program: ProgramTables, waits: MessageGraph, streams: Streams) -> None:
        self._program, self._streams, self._actions = program, streams, program.actions
        self._nodes = program.actions + len(program.messages)
        edges = [*_edges_to_actions(program), *_edges_to_messages(program, waits)]
        self._before = np.concatenate([before for before, _ in edges])
        self._behind = np.concatenate([behind for _, behind in edges])
        self._waits = waits

    def advance(self) -> npt.NDArray[np.int32]:
        """As many nodes as can run, each after those that it waits for."""
        count = self._nodes
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
        return np.array(order, np.int32)

    def circle_after(self, order: npt.NDArray[np.int32]) -> Circle | None:
        """Follow who waits for whom from a node that cannot run until one repeats; None if all nodes have run."""
        if len(order) == self._nodes:
            return None
        is_done = np.zeros(self._nodes, bool)
        is_done[order] = True
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
        steps = [self._step(behind, before) for behind, before in zip(circle, [*circle[1:], circle[0]], strict=True)]
        remedy = (
            "Move one of these earlier or later"
            if self._streams == "link"
            else f"Take schedule.with_communication('early'), which hangs on no streams; move one of these; or give "
            f"other streams than {self._streams!r}"
        )
        said = "; ".join(each for each, _ in steps)
        return Circle(f"the schedule would wait for ever: {said}. {remedy}", tuple(waiter for _, waiter in steps))

    def _step(self, behind: int, before: int) -> tuple[str, int | Post]:
        """Why one node waits for another, and the row or the post that does."""
        program, messages, actions = self._program, self._program.messages, self._actions
        if behind < actions:
            rank, action = self._rank(behind), self._spelled(behind)
            if before >= actions:
                received = program.message_action(before - actions, sending=False)
                return f"rank {rank} at {action} waits for {received}", int(messages.consumer[before - actions])
            verb = "runs {} after" if before < behind else "at {} waits for its own"
            return f"rank {rank} {verb.format(action)} {self._spelled(before)}", int(program.action_start[behind])
        message = behind - actions
        ends = (
            (True, messages.source, self._waits.ahead_sending),
            (False, messages.destination, self._waits.ahead_receiving),
        )
        for is_send, rank_of, ahead in ends:
            post, rank, waiter = (
                program.message_action(message, sending=is_send),
                int(rank_of[message]),
                Post(message, is_send),
            )
            if before >= actions and ahead[message] == before - actions:
                front = program.message_action(before - actions, sending=int(messages.source[before - actions]) == rank)
                return f"rank {rank}'s {post} stands behind {front} on its {self._name(message, is_send)}", waiter
            if before < actions and self._rank(before) == rank:
                return f"rank {rank} posts {post} after {self._spelled(before)}", waiter
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


def _edges_to_messages(program: ProgramTables, waits: MessageGraph) -> _Edges:
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
