"""Wiring: what waits for what in a program, as arrays that compiled passes take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.schedule.program import Program
from ppsim.schedule.streams import Streams

Integers = npt.NDArray[np.int64]


class Wiring(NamedTuple):
    """What waits for what in a program. It is the same for every trace of the program on the same streams.

    Parameters
    ----------
    order : array of shape (actions + messages,)
        Action a as a, message k as actions + k, each after everything that it needs.
    rank, previous : arrays of shape (actions,)
        The rank of each action, and the action before it on that rank, -1 for none.
    producer, consumer : arrays of shape (messages,)
        The actions that send and that use each message.
    sent_after, received_after : arrays of shape (messages,)
        The actions after which its send and its receive are posted; -1 for before the step.
    ahead : array of shape (messages, 2)
        The messages before it on its sender's and on its receiver's communicator, -1 for none. Where both are the same,
        the second is -1.
    link_ahead : array of shape (messages,)
        The message before it on its link, -1 for none.
    inputs : array of shape (actions, 2)
        The messages that an action waits for: ascending, then -1 for none. An overlapped pair can have two.
    """

    order: Integers
    rank: Integers
    previous: Integers
    producer: Integers
    consumer: Integers
    sent_after: Integers
    received_after: Integers
    ahead: Integers
    link_ahead: Integers
    inputs: Integers

    @classmethod
    def of(cls, program: Program, streams: Streams = "link") -> Wiring:
        """The wiring of a program on these streams. Raises ScheduleError if the program hangs on them."""
        row_action, messages = program.row_action, program.messages
        count = np.diff(program.rank_actions)
        link_ahead = np.where(messages.position > 0, np.arange(len(messages)) - 1, -1)
        previous = np.arange(program.actions) - 1
        previous[program.rank_actions[:-1][count > 0]] = -1
        producer = row_action[messages.producer].astype(np.int64)
        if program.is_posted(streams):
            graph = program.message_graph(streams)
            order, sent_after, received_after = graph.order, graph.send_after, graph.receive_after
            is_same = graph.ahead_sending == graph.ahead_receiving
            ahead = [graph.ahead_sending, np.where(is_same, -1, graph.ahead_receiving)]
        else:
            none = np.full(len(messages), -1)
            order, sent_after, received_after, ahead = _in_sequence(program), producer, none, [link_ahead, none]
        return cls(
            order=order.astype(np.int64),
            rank=np.repeat(np.arange(program.ranks), count),
            previous=previous,
            producer=producer,
            consumer=row_action[messages.consumer].astype(np.int64),
            sent_after=sent_after.astype(np.int64),
            received_after=received_after.astype(np.int64),
            ahead=np.stack(ahead, axis=1).astype(np.int64),
            link_ahead=link_ahead,
            inputs=_by_action(program, program.message_in),
        )

    @property
    def is_on_streams(self) -> bool:
        """Whether messages wait for more than their producers and those before them on their links."""
        plain = self.without_streams()
        return not all(map(np.array_equal, self, plain))

    def without_streams(self) -> Wiring:
        """The wiring if every message set off as it is made, on a link of its own."""
        none = np.full(len(self.link_ahead), -1)
        ahead = np.stack([self.link_ahead, none], axis=1)
        return self._replace(sent_after=self.producer, received_after=none, ahead=ahead)


def _in_sequence(program: Program) -> Integers:
    """All actions in a sequence in which they can run, each with the messages that it makes behind it."""
    order, made = program.execution_order.astype(np.int64), _by_action(program, program.message_out)
    nodes = np.concatenate([order[:, None], np.where(made >= 0, made + program.actions, -1)[order]], axis=1).ravel()
    return nodes[nodes >= 0]


def _by_action(program: Program, of_row: npt.NDArray[np.integer]) -> Integers:
    """The message of each row, as a table of shape (actions, 2): ascending, then -1 for none."""
    first, last = program.action_start[:-1], program.action_start[1:] - 1
    table = np.stack([of_row[first], np.where(last > first, of_row[last], -1)], axis=1).astype(np.int64)
    none = np.iinfo(np.int64).max  # sorts behind every message
    table[table < 0] = none
    table.sort(axis=1)
    table[table == none] = -1
    return table
