"""List scheduler: builds one candidate order per rank, event by event, by a policy; compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ppsim.kernel_cache import kernel, kernel_part
from ppsim.order_search.plan import Plan
from ppsim.order_search.plan_times import B, F, I, W, arrival, first_arrivals, receiver
from ppsim.order_search.policies import (
    ALTERNATE,
    BACKWARD_FIRST,
    DEEP_BACKWARD,
    DEEP_FORWARD,
    DEFER,
    FORWARD_FIRST,
    FUSE_ALWAYS,
    FUSE_AT_ONCE,
    FUSE_MIDDLE,
    RULE,
    SPLIT_HEAD,
    SPLIT_TAIL,
    WAIT_FORWARD,
    WAIT_WEIGHT,
    Policy,
)
from ppsim.order_search.problem import Floats, Integers, Tables

_NOTHING = -1  # in place of a kind or a stage


class _State(NamedTuple):
    """A schedule under construction: S stages, p ranks, m microbatches. All arrays change in place.

    Every stage takes its microbatches in sequence, so counters say which one is next.
    """

    arrival_s: Floats  # (2, S, m): when the input of an F (row 0) or a backward (row 1) arrives; inf: not sent yet
    link_free_s: Floats  # (links,)
    forwards: Integers  # (S,): how many F have been run
    backwards: Integers  # (S,): how many I or B
    queue: Integers  # (S, m): microbatches whose W waits, oldest first: queue[s, queue_head[s]:queue_tail[s]]
    queue_head: Integers  # (S,)
    queue_tail: Integers  # (S,)
    waiting: Integers  # (p,): how many W wait
    level_bytes: Integers  # (p,): activation bytes held
    unqueued_bytes: Integers  # (p,): the same without what waiting W hold
    last_kind: Integers  # (p,): of the last action that is no W
    next_s: Floats  # (leaves,): when each rank decides next; inf: when a message wakes it
    tree: Integers  # (2 leaves,): see `_earlier_child`


class _Runnable(NamedTuple):
    """What a rank could run at a moment: a stage or _NOTHING, and when more may be ready (inf: not known)."""

    backward: int
    forward: int
    next_backward_s: float
    next_forward_s: float


@kernel
def schedule_greedily(tables: Tables, policy: Policy, plan: Plan, begin_s: Floats, free_s: Floats) -> bool:
    """Write an order for every rank; False if the policy leads to no complete step.

    Parameters
    ----------
    tables : Tables
        The problem.
    policy : Policy
        How the ranks choose.
    plan : Plan
        Filled in. Holds no overlapped pairs.
    begin_s, free_s : (p,)
        Filled in with each rank's first start and last end. The plan clock may find them earlier, because here a rank
        may wait for an action that then does not come first.

    Notes
    -----
    The event loop of list scheduling: the rank that is free first decides what to run, until nothing is left.
    `_runnable` admits an F only if the oldest unfinished microbatch could still be completed on this rank within the
    limit. So the limit is never exceeded.

    With one stage per rank the oldest microbatch can therefore always go on. With several stages a policy can get
    stuck, because the rule looks no further than the oldest microbatch. Example: two stages hold 4 and 9 bytes and the
    limit is 13. Once microbatch 0 has run its backward on the second stage, the first may run F of 1 and of 2. That
    leaves 5 bytes for microbatch 1 on the second stage, for ever. Where every cap is 1 this cannot happen: a stage then
    holds at most one microbatch, and one on every stage of a rank fits any limit that a `Problem` may have.
    """
    return _run(tables, policy, _start(tables, plan, free_s), plan, begin_s, free_s)


@kernel_part
def _run(tables: Tables, policy: Policy, state: _State, plan: Plan, begin_s: Floats, free_s: Floats) -> bool:
    """Let the ranks decide, event by event, until no rank knows of anything to do; True if the step is complete."""
    left = 2 * len(tables.rank) * tables.microbatches  # F and backwards still to run
    while True:
        rank = state.tree[1]
        now = state.next_s[rank]
        if now == np.inf:
            break
        runnable = _runnable(tables, policy, state, rank, now)
        k = _choose(tables, policy, state, runnable, rank, now)
        if k == _NOTHING:
            _decide_at(state, rank, min(runnable.next_backward_s, runnable.next_forward_s))
            continue
        s = _oldest_waiting(tables, state, rank) if k == W else runnable.forward if k == F else runnable.backward
        b = _take(tables, state, rank, k, s)
        end_s = now + tables.duration_s[k, s]
        if plan.length[rank] == 0:
            begin_s[rank] = now
        at = plan.length[rank]
        plan.kind[rank, at], plan.stage[rank, at], plan.microbatch[rank, at] = k, s, b
        plan.length[rank] += 1
        free_s[rank] = end_s
        _decide_at(state, rank, end_s)
        if k != W:
            left -= 1
        direction, target = receiver(k, s, len(tables.rank))
        if target < 0:
            continue
        there_s = arrival(tables, state.link_free_s, direction, s, end_s)
        state.arrival_s[direction, target, b] = there_s
        # The receiver may have planned to decide later than when this input lets it start.
        other = tables.rank[target]
        wake_s = max(free_s[other], there_s)
        if other != rank and wake_s < state.next_s[other]:
            _decide_at(state, other, wake_s)
    return left == 0 and state.waiting.sum() == 0


@kernel
def _start(tables: Tables, plan: Plan, free_s: Floats) -> _State:
    """Nothing has run; the rank of stage 0 decides at time 0, all others when a message arrives."""
    stages, ranks, microbatches = len(tables.rank), len(free_s), tables.microbatches
    plan.length[:] = 0
    plan.joined[:] = False
    free_s[:] = 0.0
    leaves = 1
    while leaves < ranks:
        leaves *= 2
    next_s = np.full(leaves, np.inf)
    next_s[tables.rank[0]] = 0.0
    tree = np.arange(-leaves, leaves)
    for node in range(leaves - 1, 0, -1):
        tree[node] = _earlier_child(tree, next_s, node)
    return _State(
        first_arrivals(stages, microbatches),
        np.zeros(tables.links),
        np.zeros(stages, np.int64),
        np.zeros(stages, np.int64),
        np.empty((stages, microbatches), np.int64),
        np.zeros(stages, np.int64),
        np.zeros(stages, np.int64),
        np.zeros(ranks, np.int64),
        np.zeros(ranks, np.int64),
        np.zeros(ranks, np.int64),
        np.full(ranks, _NOTHING, np.int64),
        next_s,
        tree,
    )


@kernel_part
def _earlier_child(tree: Integers, next_s: Floats, node: int) -> int:
    """The rank that decides first below a node; the lower one of two.

    A tournament tree: leaf `leaves + r` is rank r, every other node holds the winner of its two children, node 1 the
    winner of all. So the next rank to decide is known at once, and a change costs log2(p) comparisons.
    """
    left, right = tree[2 * node], tree[2 * node + 1]
    return int(left if next_s[left] <= next_s[right] else right)


@kernel_part
def _decide_at(state: _State, rank: int, at_s: float) -> None:
    """Let a rank decide at that time, and carry the change up the tree."""
    state.next_s[rank] = at_s
    node = (rank + len(state.next_s)) >> 1
    while node >= 1:
        state.tree[node] = _earlier_child(state.tree, state.next_s, node)
        node >>= 1


@kernel_part
def _runnable(tables: Tables, policy: Policy, state: _State, rank: int, now: float) -> _Runnable:
    """The stages whose backward and F could run now, by the rules for deep stages, caps and memory."""
    microbatches, deep_backward = tables.microbatches, policy.rules[rank, DEEP_BACKWARD] > 0
    backward, next_backward_s, oldest = _NOTHING, np.inf, microbatches
    for i in range(tables.first[rank], tables.first[rank + 1]):
        s = tables.stages[i]
        b = state.backwards[s]
        oldest = min(oldest, b)
        if b < state.forwards[s]:
            at = state.arrival_s[1, s, b]
            if at > now:
                next_backward_s = min(next_backward_s, at)
            elif backward < 0 or deep_backward:
                backward = s
    # What the oldest unfinished microbatch has still to take on this rank, reserved before any other F is admitted.
    reserved = np.int64(0)
    for i in range(tables.first[rank], tables.first[rank + 1]):
        s = tables.stages[i]
        if state.forwards[s] <= oldest:
            reserved += tables.held_bytes[s]
    forward, next_forward_s, deep_forward = _NOTHING, np.inf, policy.rules[rank, DEEP_FORWARD] > 0
    for i in range(tables.first[rank], tables.first[rank + 1]):
        s = tables.stages[i]
        b = state.forwards[s]
        if b >= microbatches or b - state.backwards[s] >= policy.cap[s]:
            continue
        at = state.arrival_s[0, s, b]
        if at == np.inf:
            continue
        # Bytes of waiting W do not count: those W can be run first (`_choose` then puts one before the F).
        others = reserved - tables.held_bytes[s] if b <= oldest else reserved
        if state.unqueued_bytes[rank] + tables.held_bytes[s] + others > tables.limit_bytes[rank]:
            continue
        if at > now:
            next_forward_s = min(next_forward_s, at)
        elif forward < 0 or deep_forward:
            forward = s
    return _Runnable(backward, forward, next_backward_s, next_forward_s)


@kernel_part
def _choose(tables: Tables, policy: Policy, state: _State, runnable: _Runnable, rank: int, now: float) -> int:
    """The kind to run now, or _NOTHING to wait for what comes next."""
    rule, defer = policy.rules[rank, RULE], policy.rules[rank, DEFER]
    last_kind, waiting = state.last_kind[rank], state.waiting[rank]
    if waiting > defer:
        return W
    # 1. A backward, unless it is the turn of an F that can run.
    if runnable.backward >= 0 and (
        rule == BACKWARD_FIRST or runnable.forward < 0 or (rule == ALTERNATE and last_kind != I and last_kind != B)
    ):
        return _backward_kind(tables, policy, state, rank, runnable.backward)
    # 2. An F, unless a backward is soon there; a W first if what it releases is needed.
    if runnable.forward >= 0:
        patience_s = policy.rules[rank, WAIT_FORWARD] * tables.duration_s[F, runnable.forward]
        if runnable.next_backward_s - now >= patience_s or rule == FORWARD_FIRST:
            fits = state.level_bytes[rank] + tables.held_bytes[runnable.forward] <= tables.limit_bytes[rank]
            return F if fits else W
    # 3. A W, if the gap is long enough for it.
    if waiting > 0:
        gap_s = min(runnable.next_backward_s, runnable.next_forward_s) - now
        last = _NOTHING  # the highest stage with a W stands for all
        for i in range(tables.first[rank], tables.first[rank + 1]):
            if state.queue_tail[tables.stages[i]] > state.queue_head[tables.stages[i]]:
                last = tables.stages[i]
        if gap_s >= policy.rules[rank, WAIT_WEIGHT] * tables.duration_s[W, last]:
            return W
    return _NOTHING


@kernel_part
def _backward_kind(tables: Tables, policy: Policy, state: _State, rank: int, s: int) -> int:
    """How to run a backward: as I, as B, or after a W that makes room for what I leaves behind."""
    waiting, fuse, b = state.waiting[rank], policy.fuse[s], state.backwards[s]
    if (
        fuse == FUSE_ALWAYS
        or (fuse == FUSE_AT_ONCE and waiting >= policy.rules[rank, DEFER])
        or (
            fuse == FUSE_MIDDLE
            and policy.rules[rank, SPLIT_HEAD] <= b < tables.microbatches - policy.rules[rank, SPLIT_TAIL]
        )
    ):
        return B
    grows = tables.kept_bytes[s] - tables.held_bytes[s]  # W may need more than the whole microbatch held
    if state.level_bytes[rank] + grows > tables.limit_bytes[rank]:
        return W if waiting > 0 else B
    return I


@kernel_part
def _oldest_waiting(tables: Tables, state: _State, rank: int) -> int:
    """The stage whose waiting W is of the oldest microbatch; of equal ones the highest stage."""
    found = _NOTHING
    for i in range(tables.first[rank], tables.first[rank + 1]):
        s = tables.stages[i]
        if state.queue_head[s] < state.queue_tail[s] and (
            found < 0 or state.queue[s, state.queue_head[s]] <= state.queue[found, state.queue_head[found]]
        ):
            found = s
    return found


@kernel_part
def _take(tables: Tables, state: _State, rank: int, k: int, s: int) -> int:
    """Count an action as run, with the bytes that it takes or releases; returns its microbatch."""
    if k == W:
        b = int(state.queue[s, state.queue_head[s]])
        state.queue_head[s] += 1
        state.waiting[rank] -= 1
        state.level_bytes[rank] -= tables.kept_bytes[s]
        return b
    state.last_kind[rank] = k
    if k == F:
        b = int(state.forwards[s])
        state.forwards[s] += 1
        state.level_bytes[rank] += tables.held_bytes[s]
        state.unqueued_bytes[rank] += tables.held_bytes[s]
        return b
    b = int(state.backwards[s])
    state.backwards[s] += 1
    state.level_bytes[rank] -= tables.held_bytes[s]
    state.unqueued_bytes[rank] -= tables.held_bytes[s]
    if k == I:
        state.level_bytes[rank] += tables.kept_bytes[s]
        state.queue[s, state.queue_tail[s]] = b
        state.queue_tail[s] += 1
        state.waiting[rank] += 1
    return b
