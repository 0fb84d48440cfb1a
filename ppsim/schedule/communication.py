"""Communication: sends and receives that a schedule states, matched with the messages that its computations need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.posts import SENDS, PostError, Posts
from ppsim.schedule.program_tables import Integers, Messages, PostTable, ProgramTables
from ppsim.schedule.sharding import Sharding


def written_posts(tables: ProgramTables, communication: Sequence[Posts]) -> tuple[Messages, PostTable]:
    """Match stated sends and receives with the messages.

    Parameters
    ----------
    tables : ProgramTables
        The program with its derived messages.
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
    """
    counts = [len(posts) for posts in communication]
    rank = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    sends = np.concatenate([np.isin(posts.kind, SENDS) for posts in communication])
    before = np.concatenate([posts.before for posts in communication]) + tables.rank_actions[rank]
    table = PostTable(message=_carried(tables, communication, rank), sends=sends, before=before, rank=rank)
    _check_needed(tables, table, communication)
    messages, table = _in_sending_order(tables.messages, table)
    _check_receiving_order(messages, table, communication)
    return messages, table


def _carried(tables: ProgramTables, communication: Sequence[Posts], rank: Integers) -> npt.NDArray[np.int32]:
    """The message that each post carries, shape (posts,); -1 for none."""
    stages, microbatches = int(tables.stage.max()) + 1, int(tables.microbatch.max()) + 1

    def keys(rank: Integers, stage: Integers, kind: Integers, microbatch: Integers) -> Integers:
        """A number for each send or receive on a rank. It fits 64 bits: there is a row for each cell."""
        key: Integers = ((rank.astype(np.int64) * stages + stage) * len(Kind) + kind) * microbatches + microbatch
        return key

    messages, count = tables.messages, len(tables.messages)
    number = np.tile(np.arange(count, dtype=np.int32), 2)
    end_rank = np.concatenate([messages.source, messages.destination])
    end_keys = keys(end_rank, *tables.post_columns(number, np.arange(2 * count) < count))
    by_key = np.argsort(end_keys)

    stage, kind, microbatch = (
        np.concatenate([getattr(posts, name) for posts in communication]) for name in ("stage", "kind", "microbatch")
    )
    message = np.full(len(rank), -1, np.int32)
    named = np.flatnonzero((stage < stages) & (microbatch < microbatches)) if count else np.zeros(0, np.int64)
    wanted = keys(rank[named], stage[named], kind[named], microbatch[named])
    found = by_key[np.minimum(np.searchsorted(end_keys, wanted, sorter=by_key), 2 * count - 1)]
    is_there = end_keys[found] == wanted
    message[named[is_there]] = number[found[is_there]]
    return message


def _check_needed(tables: ProgramTables, posts: PostTable, communication: Sequence[Posts]) -> None:
    """Each rank posts what it needs once, on its side of what it serves, and nothing else. The first rank speaks."""
    messages, count = tables.messages, len(tables.messages)
    is_served = posts.message >= 0
    end = np.where(is_served, posts.message + np.where(posts.sends, 0, count), -1)  # sends first, then receives
    first_at = np.full(2 * count + 1, len(posts))  # the last entry is where -1 points
    np.minimum.at(first_at, end, np.arange(len(posts)))
    is_again = is_served & (first_at[end] < np.arange(len(posts)))
    row_of_end = np.concatenate([messages.producer, messages.consumer, [0]])
    row = row_of_end[end]
    is_misplaced = is_served & ((tables.row_action[row] < posts.before) != posts.sends)
    wrong = np.flatnonzero(~is_served | is_again | is_misplaced)

    missing = np.flatnonzero(first_at[:-1] == len(posts))
    # A rank's first by its rows; of those that serve one row, the receive.
    missing = missing[np.lexsort((missing < count, row_of_end[missing]))]
    missing_rank = int(tables.rank[row_of_end[missing[0]]]) if len(missing) else tables.ranks
    if len(wrong) and (rank := int(posts.rank[wrong[0]])) <= missing_rank:
        at = int(wrong[0])
        index = at - int(np.searchsorted(posts.rank, rank))
        _, post = communication[rank][index]
        if not is_served[at]:
            raise PostError(rank, index, f"{post} has nothing to carry on rank {rank}: leave it out")
        if is_again[at]:
            raise PostError(rank, index, f"{post} occurs twice: keep one")
        side = "after" if posts.sends[at] else "before"
        raise PostError(rank, index, f"{post} must come {side} {tables.action_of(int(row[at]))}")
    if len(missing):
        lacking = int(missing[0])
        post = tables.message_action(lacking % count, sending=lacking < count)
        raise PostError(
            missing_rank,
            None,
            f"{post} is missing, which {tables.action_of(int(row_of_end[lacking]))} needs; add it, or leave all "
            "communication out and it is derived",
        )


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
    due = int(np.flatnonzero(~posts.sends & (posts.message == expected))[0])
    (_, stands), (_, arrives) = communication[rank][index], communication[rank][index + due - post]
    raise PostError(
        rank,
        index,
        f"{stands} stands where {arrives} arrives: order receives as rank {messages.source[expected]} sends them",
    )


def posts_of_table(tables: ProgramTables, table: PostTable) -> tuple[Posts, ...]:
    """A table of a program's sends and receives as posts of each rank: what `written_posts` matches, made again."""
    before = table.before - tables.rank_actions[table.rank]
    columns = before, *tables.post_columns(table.message, table.sends)
    bounds = np.searchsorted(table.rank, np.arange(tables.ranks + 1)).tolist()
    return tuple(Posts(*(column[begin:end] for column in columns)) for begin, end in pairwise(bounds))


def posts_when_sent(
    tables: ProgramTables, sharding: Sequence[Sharding] | None = None
) -> tuple[tuple[Posts, ...], tuple[Sharding, ...] | None]:
    """Each send after the action that makes it, and its receive posted at the same moment of one sequence of all ranks.

    The ranks take turns, and each runs its next action if it has what that needs; a sharding entry takes a turn too.
    The program must be one that ends.

    Returns
    -------
    communication : tuple of p Posts
        All sends and receives.
    sharding : tuple of p Sharding, or None
        The sharding with its places among them.
    """
    row_action, consumer = tables.row_action.tolist(), tables.messages.destination.tolist()
    needs, message_in, message_out = tables.needs.tolist(), tables.message_in.tolist(), tables.message_out.tolist()
    at, ends = tables.rank_actions[:-1].tolist(), tables.rank_actions[1:].tolist()
    is_done, is_sent = bytearray(tables.actions), bytearray(len(tables.messages))
    posted: list[list[tuple[int, bool, int]]] = [[] for _ in at]  # of each rank: message, is it sent, before
    entries: list[list[int]] = [[] for _ in at]  # of each rank: before which action of all
    if sharding is not None:
        entries = [(each.before + begin).tolist() for each, begin in zip(sharding, at, strict=True)]
    counts: list[list[int]] = [[] for _ in at]  # of each rank: how many posts stand before its entries

    def has_what_it_needs(row: int) -> bool:
        if message_in[row] >= 0:
            return bool(is_sent[message_in[row]])
        return needs[row] < 0 or bool(is_done[row_action[needs[row]]])

    while at != ends or any(len(some) < len(every) for some, every in zip(counts, entries, strict=True)):
        for rank, action in enumerate(at):
            met = len(counts[rank])
            if met < len(entries[rank]) and entries[rank][met] <= action:
                counts[rank].append(len(posted[rank]))
                continue
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
    table = PostTable(message=message.astype(np.int32), sends=sends == 1, before=before, rank=of_rank)
    communication = posts_of_table(tables, table)
    if sharding is None or not len(table):
        return communication, sharding if sharding is None else tuple(sharding)
    columns = zip(sharding, counts, strict=True)
    return communication, tuple(Sharding(each.before, each.stage, each.kind, places) for each, places in columns)
