"""Communication: sends and receives that a schedule states, matched with the messages that its computations need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ppsim.schedule.action import Action
from ppsim.schedule.order import Order
from ppsim.schedule.posts import SENDS, PostError, Posts, check_lengths
from ppsim.schedule.program_tables import Messages, PostTable, ProgramTables


def written_posts(
    tables: ProgramTables, orders: Sequence[Order], communication: Sequence[Posts]
) -> tuple[Messages, PostTable]:
    """Match stated sends and receives with the messages.

    Parameters
    ----------
    tables : ProgramTables
        The program with its derived messages.
    orders : sequence of p orders
        What each rank computes.
    communication : sequence of p Posts
        What each rank sends and receives, and where.

    Returns
    -------
    messages : Messages
        The same messages; a link carries them in the order of the stated sends.
    posts : PostTable
        All sends and receives.

    Raises
    ------
    PostError
        If one is missing, carries nothing, occurs twice, stands on the wrong side of the computation that it serves,
        or if a link's receives do not stand in the order of its sends.
    ScheduleError
        If there are not as many ranks' posts as orders, or a post stands behind the end of its order.
    """
    check_lengths(orders, communication)
    message: list[int] = []
    for rank, posts in enumerate(communication):
        message += _messages_of_rank(tables, rank, posts)
    counts = [len(posts) for posts in communication]
    rank_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    table = PostTable(
        message=np.array(message, np.int32),
        sends=np.concatenate([np.isin(posts.kind, SENDS) for posts in communication]),
        before=np.concatenate([posts.before for posts in communication]) + tables.rank_actions[rank_of],
        rank=rank_of,
    )
    messages, table = _in_sending_order(tables.messages, table)
    _check_receiving_order(messages, table, communication)
    return messages, table


def _messages_of_rank(tables: ProgramTables, rank: int, posts: Posts) -> list[int]:
    """The message of each of a rank's posts, once they are known to be what the rank needs."""
    served: dict[Action, tuple[int, int]] = {}  # post -> its message, and the row that it serves
    for row in tables.rows_of(rank):
        if tables.message_in[row] >= 0:
            served[tables.message_action(int(tables.message_in[row]), sending=False)] = int(tables.message_in[row]), row
        if tables.message_out[row] >= 0:
            served[tables.message_action(int(tables.message_out[row]), sending=True)] = (
                int(tables.message_out[row]),
                row,
            )
    first = int(tables.rank_actions[rank])
    found: dict[Action, int] = {}
    for index, (before, post) in enumerate(posts):
        if post not in served:
            raise PostError(rank, index, f"{post} has nothing to carry on rank {rank}: leave it out")
        if post in found:
            raise PostError(rank, index, f"{post} occurs twice: keep one")
        found[post], row = served[post]
        is_behind = int(tables.row_action[row]) < first + before
        if (post.kind in SENDS) != is_behind:
            side = "after" if post.kind in SENDS else "before"
            raise PostError(rank, index, f"{post} must come {side} {tables.action_of(row)}")
    missing = next((post for post in served if post not in found), None)
    if missing is not None:
        raise PostError(
            rank,
            None,
            f"{missing} is missing, which {tables.action_of(served[missing][1])} needs; add it, or leave all "
            "communication out and it is derived",
        )
    return list(found.values())


def _in_sending_order(messages: Messages, posts: PostTable) -> tuple[Messages, PostTable]:
    """The messages numbered by link and then as they are sent, and the posts with these numbers."""
    sent = posts.message[posts.sends]  # rank after rank, as sent
    order = sent[np.argsort(messages.link[sent], kind="stable")]
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    sent_after = np.empty(len(order), np.int32)
    sent_after[sent] = posts.before[posts.sends] - 1
    columns = {
        name: getattr(messages, name)[order] for name in ("producer", "consumer", "source", "destination", "link")
    }
    # Positions count up on each link as before, since links keep their places in the table.
    return replace(messages, **columns, sent_after=sent_after[order]), replace(posts, message=number[posts.message])


def _check_receiving_order(messages: Messages, posts: PostTable, communication: Sequence[Posts]) -> None:
    """The receives of each link stand in the order of its sends: PyTorch's messages are told apart by nothing else."""
    received = np.flatnonzero(~posts.sends)
    by_link = received[np.argsort(messages.link[posts.message[received]], kind="stable")]
    wrong = np.flatnonzero(posts.message[by_link] != np.arange(len(by_link)))
    if not len(wrong):
        return
    post, expected = int(by_link[wrong[0]]), int(wrong[0])
    rank = int(posts.rank[post])
    index = post - int(np.searchsorted(posts.rank, rank))
    actions = {int(posts.message[at]): action for at, (_, action) in _of_rank(posts, rank, communication)}
    raise PostError(
        rank,
        index,
        f"{actions[int(posts.message[post])]} stands where {actions[expected]} arrives: order receives as rank "
        f"{messages.source[expected]} sends them",
    )


def _of_rank(posts: PostTable, rank: int, communication: Sequence[Posts]) -> list[tuple[int, tuple[int, Action]]]:
    """A rank's posts with their numbers in the table."""
    first = int(np.searchsorted(posts.rank, rank))
    return list(enumerate(communication[rank], first))


def posts_when_sent(tables: ProgramTables) -> PostTable:
    """Each send after the action that makes it, and its receive posted at the same moment of one sequence of all ranks.

    The ranks take turns, and each runs its next action if it has what that needs. The program must be one that ends.
    """
    row_action, consumer = tables.row_action.tolist(), tables.messages.destination.tolist()
    needs, message_in, message_out = tables.needs.tolist(), tables.message_in.tolist(), tables.message_out.tolist()
    at, ends = tables.rank_actions[:-1].tolist(), tables.rank_actions[1:].tolist()
    is_done, is_sent = bytearray(tables.actions), bytearray(len(tables.messages))
    posted: list[list[tuple[int, bool, int]]] = [[] for _ in at]  # of each rank: message, is it sent, before

    def has_what_it_needs(row: int) -> bool:
        if message_in[row] >= 0:
            return bool(is_sent[message_in[row]])
        return needs[row] < 0 or bool(is_done[row_action[needs[row]]])

    while at != ends:
        for rank, action in enumerate(at):
            if action == ends[rank]:
                continue
            rows = range(int(tables.action_start[action]), int(tables.action_start[action + 1]))
            if not all(map(has_what_it_needs, rows)):
                continue
            is_done[action] = 1
            at[rank] += 1
            for message in (message_out[row] for row in rows if message_out[row] >= 0):
                is_sent[message] = 1
                posted[rank].append((message, True, at[rank]))
                posted[consumer[message]].append((message, False, at[consumer[message]]))
    every = np.array([(*post, rank) for rank, posts in enumerate(posted) for post in posts], np.int64).reshape(-1, 4)
    message, sends, before, of_rank = every.T
    return PostTable(message=message.astype(np.int32), sends=sends == 1, before=before, rank=of_rank)
