"""Program tables: a lowered schedule as flat arrays, with a row for each computation and for each message."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Action, Kind, OverlappedPair

Integers = npt.NDArray[np.integer]

# What a message is called, by whether it is sent (else received) and whether it goes forward.
_POST_KINDS = np.array([[Kind.RECV_B, Kind.RECV_F], [Kind.SEND_B, Kind.SEND_F]], np.int32)


@dataclass(frozen=True, kw_only=True)
class Messages:
    """The message table: one entry for each result that crosses ranks, ordered by link and then by position on it.

    Parameters
    ----------
    producer, consumer : arrays of shape (messages,)
        The rows that make and that need the result.
    source, destination : arrays of shape (messages,)
        The ranks of those rows. A link is such an ordered pair.
    link : array of shape (messages,)
        The number of the link in `ProgramTables.links()`.
    position : array of shape (messages,)
        0 for the first message of the link. A link carries messages in the order in which its sender sends them: as
        written, else as it produces them.
    sent_after : array of shape (messages,)
        The action of the sender after which the message is sent: its producer's, unless it is written later.
    """

    producer: Integers
    consumer: Integers
    source: Integers
    destination: Integers
    link: Integers
    position: Integers
    sent_after: Integers

    def __len__(self) -> int:
        return len(self.producer)


@dataclass(frozen=True, kw_only=True)
class PostTable:
    """The sends and receives of all ranks, rank after rank, each rank's in the sequence in which it posts them.

    Parameters
    ----------
    message : array of shape (posts,)
        Which message is sent or received.
    sends : array of shape (posts,)
        True for a send, False for a receive.
    before : array of shape (posts,)
        The action that the post stands before; for those after a rank's last action the number that follows that.
    rank : array of shape (posts,)
        Who posts it.
    """

    message: Integers
    sends: npt.NDArray[np.bool_]
    before: Integers
    rank: Integers

    def __len__(self) -> int:
        return len(self.message)


class Post(NamedTuple):
    """A send or a receive of a message."""

    message: int
    is_send: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgramTables:
    """All orders as one table, rank after rank, and the message table.

    A row is one computation: an action, or one of the two parts of an overlapped pair.

    Parameters
    ----------
    stage, kind, microbatch, rank : arrays of shape (rows,)
        What each row computes, and where.
    action_start : array of shape (actions + 1,)
        Action k has the rows action_start[k] to action_start[k + 1]: two for an overlapped pair, else one.
    rank_actions : array of shape (p + 1,)
        Rank r has the actions rank_actions[r] to rank_actions[r + 1].
    needs : array of shape (rows,)
        The row of another stage whose result this row waits for; -1 for none.
    message_in, message_out : arrays of shape (rows,)
        The message that brings what the row needs, and the one that takes its result away; -1 where none crosses ranks.
    messages : Messages
        The message table.
    written : PostTable or None
        The sends and receives as the schedule states them; None if it leaves them to be derived.
    """

    stage: Integers
    kind: Integers
    microbatch: Integers
    rank: Integers
    action_start: Integers
    rank_actions: Integers
    needs: Integers
    message_in: Integers
    message_out: Integers
    messages: Messages = field(repr=False)
    written: PostTable | None = field(default=None, repr=False)

    @property
    def ranks(self) -> int:
        """Number of ranks, p."""
        return len(self.rank_actions) - 1

    @property
    def actions(self) -> int:
        """Number of actions; an overlapped pair counts once."""
        return len(self.action_start) - 1

    @property
    def has_pairs(self) -> bool:
        """Whether some action is an overlapped pair. Without one, row k is action k."""
        return self.actions < len(self.stage)

    @cached_property
    def row_action(self) -> Integers:
        """The action that each row belongs to, shape (rows,)."""
        return row_actions(self.action_start)

    @cached_property
    def is_recomputed(self) -> npt.NDArray[np.bool_]:
        """Whether each row is of a (stage, microbatch) that has an R, shape (rows,)."""
        again: npt.NDArray[np.bool_] = self.kind == Kind.R
        if not again.any():
            return again
        cell = self.stage.astype(np.int64) * (int(self.microbatch.max()) + 1) + self.microbatch
        found: npt.NDArray[np.bool_] = np.isin(cell, cell[again])
        return found

    def action_of(self, row: int) -> Action:
        """The row as an Action (one part of a pair)."""
        return Action(int(self.stage[row]), Kind(int(self.kind[row])), int(self.microbatch[row]))

    def rows_of(self, rank: int) -> range:
        """The rows of a rank, in its order."""
        first, last = self.rank_actions[rank], self.rank_actions[rank + 1]
        return range(int(self.action_start[first]), int(self.action_start[last]))

    def links(self) -> list[tuple[int, int]]:
        """The directed links (source rank, destination rank) that carry at least one message, ascending."""
        first = np.flatnonzero(self.messages.position == 0)  # the table is ordered by link
        return list(zip(self.messages.source[first].tolist(), self.messages.destination[first].tolist(), strict=True))

    def message_action(self, message: int, *, sending: bool) -> Action:
        """A message as PyTorch spells it: `0SEND_F3` at its producer, `1RECV_F3` at its consumer."""
        row = int(self.messages.producer[message] if sending else self.messages.consumer[message])
        kind = _POST_KINDS[int(sending), int(self.kind[row] == Kind.F)]
        return Action(int(self.stage[row]), Kind(int(kind)), int(self.microbatch[row]))

    def post_columns(self, message: Integers, sends: npt.NDArray[np.bool_]) -> tuple[Integers, Integers, Integers]:
        """Sends and receives as PyTorch spells them: a send at its producer, a receive at its consumer.

        Parameters
        ----------
        message : array of shape (posts,)
            What is sent or received.
        sends : array of shape (posts,)
            True for a send, False for a receive.

        Returns
        -------
        stage, kind, microbatch : arrays of shape (posts,)
            As in `Action`.
        """
        row = np.where(sends, self.messages.producer[message], self.messages.consumer[message])
        kind = _POST_KINDS[sends.astype(np.int8), (self.kind[row] == Kind.F).astype(np.int8)]
        return self.stage[row], kind, self.microbatch[row]

    @cached_property
    def posts(self) -> PostTable:
        """All sends and receives: as written, else a receive before the action that uses it, a send after its own.

        The receives of a link stand in the order of its sends, as they must where messages carry no names. A message
        that is used after a later one of its link is therefore received before that one, earlier than it is used.
        """
        if self.written is not None:
            return self.written
        messages, row_action, count = self.messages, self.row_action, len(self.messages)
        # The row before which each message is received: the first that uses it or a later one of its link. Links are
        # told apart by an offset, and taken from the last to the first, so that the minimum stays within a link.
        offset = messages.link.astype(np.int64) * len(self.stage)
        used = np.minimum.accumulate((messages.consumer + offset)[::-1])[::-1] - offset
        index = np.arange(count, dtype=np.int32)
        message, sends = np.concatenate([index, index]), np.arange(2 * count) < count
        before = np.concatenate([row_action[messages.producer] + 1, row_action[used]])
        rank = np.concatenate([messages.source, messages.destination])
        row = np.concatenate([messages.producer, used])
        order = np.lexsort((messages.position[message], row, ~sends, before, rank))
        return PostTable(message=message[order], sends=sends[order], before=before[order], rank=rank[order])

    def posts_of(self, rank: int) -> list[list[Post]]:
        """What a rank posts before each of its actions, and, at the end, after the last."""
        begin, end = np.searchsorted(self.posts.rank, [rank, rank + 1])
        first, last = int(self.rank_actions[rank]), int(self.rank_actions[rank + 1])
        found: list[list[Post]] = [[] for _ in range(last - first + 1)]
        columns = (self.posts.message, self.posts.sends, self.posts.before - first)
        for message, is_send, before in zip(*(column[begin:end].tolist() for column in columns), strict=True):
            found[before].append(Post(message, is_send))
        return found

    def order_with_messages(self, rank: int) -> list[Action | OverlappedPair]:
        """A rank's actions, with its sends and receives where they stand."""
        rows, posts = self.rows_of(rank), self.posts
        span = slice(*np.searchsorted(posts.rank, [rank, rank + 1]).tolist())
        parts = _actions(self.stage[rows], self.kind[rows], self.microbatch[rows])
        sent = _actions(*self.post_columns(posts.message[span], posts.sends[span]))
        first, last = int(self.rank_actions[rank]), int(self.rank_actions[rank + 1])
        starts = (self.action_start[first : last + 1] - rows.start).tolist()
        result: list[Action | OverlappedPair] = []
        done = 0
        for post, before in zip(sent, (posts.before[span] - first).tolist(), strict=True):
            result += _joined(parts, starts[done : before + 1])
            result.append(post)
            done = before
        return result + _joined(parts, starts[done:])


def _actions(stage: Integers, kind: Integers, microbatch: Integers) -> list[Action]:
    return [Action(s, Kind(k), m) for s, k, m in zip(stage.tolist(), kind.tolist(), microbatch.tolist(), strict=True)]


def _joined(parts: list[Action], starts: list[int]) -> list[Action | OverlappedPair]:
    """The actions that begin at the rows `starts`, but the last, where the last of them ends."""
    return [parts[begin] if end - begin == 1 else OverlappedPair(*parts[begin:end]) for begin, end in pairwise(starts)]


def row_actions(action_start: Integers) -> Integers:
    """The action that each row belongs to, shape (rows,), from the first row of each action."""
    rows, actions = int(action_start[-1]), len(action_start) - 1
    index = np.arange(actions, dtype=np.int32)
    return index if rows == actions else np.repeat(index, np.diff(action_start))
