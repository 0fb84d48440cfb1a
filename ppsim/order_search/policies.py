"""Policies: how a rank of the list scheduler chooses what to run, and the grid of policies that are tried first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppsim.order_search.lower_bound import Chains
from ppsim.order_search.problem import Floats, Integers, Problem
from ppsim.schedule.action import Kind

# Columns of `Policy.rules`: what a rank does when it is free.
RULE = 0  # which goes first when an I and an F can both run: BACKWARD_FIRST, ALTERNATE or FORWARD_FIRST
WAIT_FORWARD = 1  # run no F if an I is known to be ready within this share of the F's duration
WAIT_WEIGHT = 2  # put no W into a gap that is shorter than this share of the W's duration
DEFER = 3  # how many W may wait before one runs at once
DEEP_FORWARD, DEEP_BACKWARD = 4, 5  # of several stages that can run, take the highest (1) or the lowest (0)
SPLIT_HEAD, SPLIT_TAIL = 6, 7  # with FUSE_MIDDLE: how many microbatches are split at the start and at the end
COLUMNS = 8
BACKWARD_FIRST, ALTERNATE, FORWARD_FIRST = 0, 1, 2
# `Policy.fuse`, where to run a full B instead of I and W: nowhere, everywhere, where a W would have to follow at once,
# or for all microbatches between the split head and tail.
FUSE_NEVER, FUSE_ALWAYS, FUSE_AT_ONCE, FUSE_MIDDLE = 0, 1, 2, 3


class Policy(NamedTuple):
    """How each rank chooses its next action; or n policies at once, with a leading axis of n.

    Machine code knows the fields by position, so this file counts as one with kernels for `ppsim.kernel_cache`.

    Parameters
    ----------
    rules : (p, COLUMNS)
        A number for each of the columns above.
    cap : (S,)
        The most microbatches that a stage may have between F and the end of its backward.
    fuse : (S,)
        Where full backwards are run: one of FUSE_*.

    Notes
    -----
    After the heuristic of Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 3: fill the warm-up with
    forwards as memory allows, then alternate, and run W in gaps and where memory must be released. The paper's binary
    choices are numbers here, on each rank, so that a local search can turn them (`policy_tuning`).
    """

    rules: Floats
    cap: Integers
    fuse: Integers


def portfolio(problem: Problem, *, wide: bool) -> Policy:
    """The policies to try first.

    Parameters
    ----------
    problem : Problem
    wide : bool
        Most of a thousand policies, not about a hundred. Seven times as many where a full backward pays.

    Returns
    -------
    Policy
        With a leading axis: one entry per policy.

    Notes
    -----
    A grid over the choices, with a few values between the extremes of each. It only has to come close: the local search
    over policies (`policy_tuning`) does the rest.
    """
    ranks, stages = problem.ranks, len(problem.placement)
    none, rank = np.zeros(ranks, np.int64), np.arange(ranks)
    unbounded = np.full(ranks, problem.microbatches)
    rules = range(3) if wide else range(2)
    waits = (0, 0.5, 0.9) if wide else (0, 0.5)
    caps = _caps(problem, (0, 0.2, 0.4, 0.6, 0.8, 1, 1.3, 1.6, 2, 3) if wide else (0, 0.4, 0.8, 1.3))
    defers = (unbounded, rank, 2 * rank, none) if wide else (unbounded, rank)
    deep: tuple[tuple[int, int], ...] = ((0, 0),)
    if stages > ranks:
        deep = ((0, 1), (1, 1), (0, 0), (1, 0)) if wide else ((0, 1), (1, 1))
    fuses = [(FUSE_NEVER, none, none)]
    if problem.tables.full_backward_pays:
        fuses += [(FUSE_ALWAYS, none, none), (FUSE_AT_ONCE, none, none)]
        fuses += [(FUSE_MIDDLE, head, tail) for head in (none, rank) for tail in (rank, 2 * rank)]
    found: list[Policy] = []
    for rule, wait_forward, wait_weight, cap, (number, defer), (forward, backward), (
        fuse,
        head,
        tail,
    ) in itertools.product(rules, waits, waits, caps, enumerate(defers), deep, fuses):
        if (number > 0 and wait_weight > 0) or (rule == FORWARD_FIRST and wait_forward > 0):
            continue  # the wait would hardly ever matter
        row = np.empty((ranks, COLUMNS))
        row[:, RULE] = rule
        row[:, WAIT_FORWARD], row[:, WAIT_WEIGHT] = wait_forward, wait_weight
        row[:, DEFER] = defer
        row[:, DEEP_FORWARD], row[:, DEEP_BACKWARD] = forward, backward
        row[:, SPLIT_HEAD], row[:, SPLIT_TAIL] = head, tail
        found.append(Policy(row, cap, np.full(stages, fuse, np.int64)))
    return Policy._make(np.array(column) for column in zip(*found, strict=True))


def take(policies: Policy, index: Sequence[int]) -> Policy:
    """Copies of the policies with these numbers."""
    return Policy._make(column[list(index)] for column in policies)


def one_by_one(policies: Policy) -> list[Policy]:
    """Each policy as a view, without the leading axis."""
    return [Policy._make(each) for each in zip(*policies, strict=True)]


def _caps(problem: Problem, shares: Sequence[float]) -> list[Integers]:
    """Some numbers of microbatches that a stage may have between F and backward, shape (S,) each.

    A stage whose microbatches come back after R seconds needs R / d of them to start one every d seconds. d = F keeps
    a rank busy with forwards until the first comes back: ZB-H2's warm-up. d = the longest rank's work per microbatch
    suffices for the pace of the steady state. 1F1B's p - r lies between them. A share says where d lies; the last cap
    is what memory alone allows.
    """
    tables, chain = problem.tables, Chains(problem)
    forward_s = tables.duration_s[Kind.F]
    pace_s = np.bincount(tables.rank, forward_s + chain.work, problem.ranks).max()
    room = np.full(len(forward_s), problem.microbatches, np.int64)
    sized = tables.held_bytes > 0
    room[sized] = np.minimum(room[sized], problem.limit_bytes[tables.rank[sized]] // tables.held_bytes[sized])
    caps = []
    for share in shares:
        apart_s = forward_s + share * (pace_s - forward_s)
        count = np.divide(chain.round_trip, apart_s, out=np.zeros(len(forward_s)), where=apart_s > 0)
        whole = np.floor(count * (1 + 1e-9)).astype(np.int64)  # R / d that is whole but for rounding counts as whole
        caps += [np.clip(whole + extra, 1, room) for extra in (0, 1)]
    return [*caps, room]
