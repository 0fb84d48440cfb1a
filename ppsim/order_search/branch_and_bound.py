"""Branch and bound: all partial steps, layer by layer, or a beam of the most promising, for the best order of all."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.order_search.partial_steps import Clockwork, Desk, Layer, expand
from ppsim.order_search.plan import Plan
from ppsim.order_search.problem import AHEAD, BACK, Integers, Problem
from ppsim.schedule.action import Kind

_FIRST_ROOM = 1 << 12  # entries of a layer at first; it grows
_MOST_ROOM = 1 << 20  # entries of a layer at most: some 300 bytes each
_BUCKETS = 1 << 14
_CHUNK = 4096  # entries that are expanded before the time is looked at
_LARGEST_PART = 1000  # durations that are fractions of each other with up to this denominator are counted exactly
_FINEST = 1 << 40  # else ticks of the longest duration
_LATEST = 1 << 58  # ticks; later than any step ends
_NOTHING = -1  # in place of an entry


class Walk(NamedTuple):
    """What came out of a walk through the graph of partial steps.

    Parameters
    ----------
    bound_s : float
        No order under the limit has a smaller objective, or that of the goal, if this is smaller.
    plan : Plan or None
        An order with a smaller objective than the goal; None if none was found.
    is_complete : bool
        Whether nothing was left out: then the plan is optimal, and without a plan no order is better than the goal.
    steps : int
        How many partial steps were gone on from.
    """

    bound_s: float
    plan: Plan | None
    is_complete: bool
    steps: int


def walk(
    problem: Problem,
    goal_s: float,
    *,
    most_steps: float = math.inf,
    width: int | None = None,
    time_limit_s: float = math.inf,
    only_ranks: Sequence[int] | None = None,
) -> Walk:
    """Look for an order better than the goal among all orders, or show that there is none.

    Parameters
    ----------
    problem : Problem
        Stages run their parts one after another: overlapped pairs are not looked for, and what stages communicate
        counts as compute.
    goal_s : float
        Only smaller objectives are of interest, in seconds.
    most_steps : float
        Give up after so many partial steps.
    width : int, optional
        Go on only from that many partial steps with the same number of actions, those of the smallest bounds: a beam.
        By default from all.
    time_limit_s : float
        Give up after so many seconds.
    only_ranks : sequence of int, optional
        Look at these ranks alone, which must hold the first and the last stage, for a bound: there is no plan then.

    Returns
    -------
    Walk

    Notes
    -----
    Microbatches are alike, so some best order takes them in sequence on every stage: whichever F of a stage comes
    i-th may be called that of microbatch i, likewise backwards and W; each has what it needs, for i inputs have arrived
    by then, and the same bytes are held. A partial step is then how many F, backwards and W each stage has run, when
    each rank and link is free, and when the messages under way arrive. What may follow depends on nothing else, and
    nothing that follows gets worse where any of these times is earlier. So of two partial steps with the same numbers
    one is dropped if the other is nowhere later (dominance). Actions are added in the sequence of their starts.
    Times before the last start are all one. A rank's first action is F of microbatch 0 on its first stage and starts
    at one time in all orders, so that the longest time of a rank, too, grows with the ends alone.

    A partial step whose bound reaches the goal is dropped. The bound is the larger of two. One is each rank's work
    left. The other lets each stage run one action of a kind at a time, in sequence and behind its inputs, while
    memory's slots are free (`ppsim.order_search.lower_bound.lower_bound_s`), but lets stages and kinds run side by
    side.

    With `only_ranks` the stages of other ranks are delays between those that are left: as if they ran any number of
    actions at once, with no limit, and links carried any number of messages. Every step satisfies that, so the bound
    holds. The graph is far smaller, and often two ranks at the ends decide.

    Times are whole ticks. Durations that are fractions of each other are counted exactly, others rounded down to a
    2^40th of the longest. The first is how instances in the literature are; the second keeps the bound a bound.
    """
    clock, tick_s = clockwork(problem)
    if only_ranks is not None:
        clock = _restricted(clock, sorted(set(only_ranks)))
    goal = math.ceil(min(goal_s / tick_s * (1 - 1e-12), _LATEST))
    began_s, actions = time.monotonic(), 3 * len(clock.rank) * problem.microbatches
    layers, desk = [_empty_layer(clock, _FIRST_ROOM) for _ in range(3)], _desk(clock)
    layers[0].is_alive[0] = True
    layers[0].length[0] = 1
    trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
    bound, steps = goal, 0
    for _ in range(actions):
        layer = layers[0]
        index = _open(layer, goal)
        if width is not None and len(index) > width:
            ranked = index[np.lexsort((layer.time[index].sum(axis=1), layer.bound[index]))]
            index = np.sort(ranked[:width])
            bound = min(bound, int(layer.bound[ranked[width]]))
        done = 0
        while done < len(index):
            chunk = index[done : done + _CHUNK]
            expanded = expand(clock, layer, chunk, layers[1], layers[2], desk, goal)
            done += expanded
            is_full = expanded < len(chunk)
            if (is_full and len(layers[1].bound) >= _MOST_ROOM) or (
                done < len(index) and (steps + done > most_steps or time.monotonic() - began_s > time_limit_s)
            ):
                left = [layer.bound[index[done:]], *(each.bound[_open(each, goal)] for each in layers[1:])]
                least = min(int(bounds.min(initial=goal)) for bounds in left)
                return Walk(min(bound, least) * tick_s, None, False, steps + done)
            if is_full:
                layers[1:] = [_grown_layer(each) for each in layers[1:]]
        steps += len(index)
        length = int(layer.length[0])
        trail.append((layer.parent[:length].copy(), layer.action[:length].copy()))
        layer.length[0] = 0
        layer.bucket[:] = _NOTHING
        spare = layer if len(layer.bound) == len(layers[1].bound) else _empty_layer(clock, len(layers[1].bound))
        layers = [layers[1], layers[2], spare]
    found = _open(layers[0], goal)
    is_complete = bound == goal
    if not len(found):
        return Walk(bound * tick_s, None, is_complete, steps)
    ends = np.maximum(layers[0].bound[found], (layers[0].time[found, : len(clock.limit)] - clock.begin).max(axis=1))
    best = int(found[ends.argmin()])
    trail.append((layers[0].parent, layers[0].action))
    plan = _plan(problem, trail, best) if only_ranks is None else None
    return Walk(min(bound, int(ends.min())) * tick_s, plan, is_complete, steps)


def _open(layer: Layer, goal: int) -> Integers:
    """The entries that may lead to a smaller objective than the goal."""
    length = int(layer.length[0])
    return np.flatnonzero(layer.is_alive[:length] & (layer.bound[:length] < goal))


def _plan(problem: Problem, trail: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]], last: int) -> Plan:
    """The orders that end in an entry of the last layer, by way of the layers' parents and actions."""
    actions: list[tuple[int, int]] = []
    number = len(trail) - 1
    while number > 0:
        parents, codes = trail[number]
        stage, kind = divmod(int(codes[last]), 4)
        actions.append((stage, kind))
        last = int(parents[last])
        number -= 2 if kind == Kind.B else 1
    plan = Plan.empty(problem)
    forwards, backwards = np.zeros((2, len(problem.placement)), np.int64)
    waiting: list[list[int]] = [[] for _ in problem.placement]
    for stage, kind in reversed(actions):
        if kind == Kind.W:
            microbatch = waiting[stage].pop(0)
        else:
            counts = forwards if kind == Kind.F else backwards
            microbatch = int(counts[stage])
            counts[stage] += 1
            if kind == Kind.I:
                waiting[stage].append(microbatch)
        rank = problem.placement[stage]
        at = plan.length[rank]
        plan.kind[rank, at], plan.stage[rank, at], plan.microbatch[rank, at] = kind, stage, microbatch
        plan.length[rank] += 1
    return plan


def _tick_s(durations_s: Sequence[float]) -> float:
    """The seconds of a tick: the largest of which all durations are multiples, or a small part of the longest."""
    positive = sorted(seconds for seconds in durations_s if seconds > 0)
    if not positive:
        return 1.0
    parts = [Fraction(seconds / positive[0]).limit_denominator(_LARGEST_PART) for seconds in positive]
    are_exact = all(
        abs(float(part) * positive[0] - seconds) < 1e-12 * seconds
        for part, seconds in zip(parts, positive, strict=True)
    )
    denominator = math.lcm(*(part.denominator for part in parts))
    if are_exact and denominator * positive[-1] / positive[0] < _FINEST:
        return positive[0] / denominator
    return positive[-1] / _FINEST


def clockwork(problem: Problem) -> tuple[Clockwork, float]:
    """The problem in ticks, and the seconds of a tick."""
    tables, m = problem.tables, problem.microbatches
    times_s = (tables.duration_s, tables.occupied_s, tables.latency_s)
    tick_s = _tick_s(sorted({seconds for each in times_s for seconds in each.ravel().tolist()}))
    # A little is added before rounding down, as exact multiples may lie below by rounding.
    duration, occupied, latency = (np.floor(each / tick_s + 1e-4).astype(np.int64) for each in times_s)
    least = np.minimum(duration[Kind.I], duration[Kind.B])
    hop_ahead, hop_back = occupied + latency
    ahead = np.concatenate([[0], np.cumsum(duration[Kind.F][:-1] + hop_ahead[:-1])])
    back = np.concatenate([[0], np.cumsum(least[1:] + hop_back[1:])])
    limit, held = tables.limit_bytes, tables.held_bytes
    room = np.full(len(held), m, np.int64)
    room[held > 0] = limit[tables.rank[held > 0]] // held[held > 0]
    slots, is_tight = np.full(problem.ranks, m, np.int64), np.zeros(problem.ranks, np.bool_)
    for rank in range(problem.ranks):
        own = tables.stages[tables.first[rank] : tables.first[rank + 1]]
        if held[own[0]] > 0:
            slots[rank] = min(m, 1 + (limit[rank] - held[own].sum()) // held[own[0]])
            is_tight[rank] = len(own) == 1 and limit[rank] - slots[rank] * held[own[0]] < tables.kept_bytes[own[0]]
    grows = bool((tables.kept_bytes > held).any())
    first = tables.stages[tables.first[:-1]]
    return Clockwork(
        duration=duration,
        least=least,
        work=np.minimum(duration[Kind.I] + duration[Kind.W], duration[Kind.B]),
        held=held,
        kept=tables.kept_bytes,
        rank=tables.rank,
        first=tables.first,
        stages=tables.stages,
        link=tables.link,
        occupied=occupied,
        latency=latency,
        links=tables.links if occupied.any() else 0,
        limit=limit,
        begin=ahead[first] if problem.by_rank_time else np.zeros(problem.ranks, np.int64),
        back=np.zeros_like(back) if problem.by_rank_time else back,
        cap=np.minimum(m, room),
        slots=slots,
        is_tight=is_tight,
        may_fuse=tables.full_backward_pays or grows,
        may_split=not grows,
        microbatches=m,
        by_rank_time=problem.by_rank_time,
    ), tick_s


def _restricted(clock: Clockwork, ranks: Sequence[int]) -> Clockwork:
    """The problem of these ranks alone, the stages of others as delays."""
    kept = np.flatnonzero(np.isin(clock.rank, ranks))
    if kept[0] != 0 or kept[-1] != len(clock.rank) - 1:
        raise ValueError(f"ranks {list(ranks)} do not hold the first and the last stage")
    stages, own = len(kept), np.array(ranks)
    hop_ahead, hop_back = clock.occupied + clock.latency
    latency, link = np.zeros((2, stages), np.int64), np.full((2, stages), _NOTHING, np.int64)
    for i in range(stages - 1):
        here, there = int(kept[i]), int(kept[i + 1])
        between = slice(here + 1, there)
        latency[AHEAD, i] = hop_ahead[here:there].sum() + clock.duration[Kind.F, between].sum()
        latency[BACK, i + 1] = hop_back[here + 1 : there + 1].sum() + clock.least[between].sum()
        link[AHEAD, i] = link[BACK, i + 1] = 0
    rank = np.searchsorted(own, clock.rank[kept])
    first = np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=len(own)))])
    return clock._replace(
        duration=np.ascontiguousarray(clock.duration[:, kept]),
        least=clock.least[kept],
        work=clock.work[kept],
        held=clock.held[kept],
        kept=clock.kept[kept],
        rank=rank.astype(np.int64),
        first=first.astype(np.int64),
        stages=np.argsort(rank, kind="stable").astype(np.int64),
        link=link,
        occupied=np.zeros((2, stages), np.int64),
        latency=latency,
        links=0,
        limit=clock.limit[own],
        begin=clock.begin[own],
        back=clock.back[kept],
        cap=clock.cap[kept],
        slots=clock.slots[own],
        is_tight=clock.is_tight[own],
    )


def _empty_layer(clock: Clockwork, room: int) -> Layer:
    """A layer without entries, with room for that many."""
    stages = len(clock.rank)
    # A microbatch under way has one message that waits, at most; the last place is for one that is just being added.
    times = len(clock.limit) + clock.links + int(clock.cap[0]) + 1
    return Layer(
        counts=np.zeros((room, 3, stages), np.int16),
        time=np.zeros((room, times), np.int64),
        bound=np.zeros(room, np.int64),
        parent=np.zeros(room, np.int32),
        action=np.zeros(room, np.int16),
        following=np.zeros(room, np.int32),
        is_alive=np.zeros(room, np.bool_),
        bucket=np.full(_BUCKETS, _NOTHING, np.int32),
        length=np.zeros(1, np.int64),
    )


def _grown_layer(layer: Layer) -> Layer:
    """The layer with four times the room."""
    shared = {"bucket", "length"}
    return Layer._make(
        column
        if name in shared
        else np.concatenate([column, np.zeros((3 * len(column), *column.shape[1:]), column.dtype)])
        for name, column in layer._asdict().items()
    )


def _desk(clock: Clockwork) -> Desk:
    """Room to work in."""
    stages, m = len(clock.rank), clock.microbatches
    return Desk(
        counts=np.zeros((3, stages), np.int16),
        arrival=np.zeros((2, stages, m), np.int64),
        child_counts=np.zeros((3, stages), np.int16),
        child_arrival=np.zeros((2, stages, m), np.int64),
        child_time=np.zeros(len(clock.limit) + clock.links + int(clock.cap[0]) + 1, np.int64),
        forward_end=np.zeros(stages, np.int64),
        backward_end=np.zeros((m, stages), np.int64),
        backward_free=np.zeros(stages, np.int64),
        start=np.zeros((4, stages), np.int64),
    )
