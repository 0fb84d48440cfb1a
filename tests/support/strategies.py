"""Strategies: random schedules, costs and networks.

Numbers are multiples of powers of two, so that sums of floats are exact and answers can be compared with `==`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from ppsim import (
    Action,
    Collectives,
    Conditions,
    HostLink,
    Kind,
    Link,
    LinkPiece,
    Network,
    OverlappedPair,
    Reduction,
    Schedule,
    ScheduleError,
    StageCost,
)
from ppsim.schedule.deadlock import smallest_receive_window


def _actions(
    stages: int, routes: Sequence[int], split: set[tuple[int, int]], again: set[tuple[int, int]]
) -> dict[Action, set[Action]]:
    """Every action of a complete step and what it needs.

    stages: of one copy of the model. routes: the copy of each microbatch. split: which (stage, microbatch) have I and
    W. again: which have R.
    """

    def toward_input(stage: int, mb: int) -> Action:
        return Action(stage, Kind.I if (stage, mb) in split else Kind.B, mb)

    needs: dict[Action, set[Action]] = {}
    for mb, copy in enumerate(routes):
        first, last = copy * stages, (copy + 1) * stages - 1
        for stage in range(first, last + 1):
            forward, backward = Action(stage, Kind.F, mb), toward_input(stage, mb)
            needs[forward] = {Action(stage - 1, Kind.F, mb)} if stage > first else set()
            needs[backward] = {forward} | ({toward_input(stage + 1, mb)} if stage < last else set())
            if (stage, mb) in again:
                needs[Action(stage, Kind.R, mb)] = {forward}
                needs[backward].add(Action(stage, Kind.R, mb))
            if backward.kind == Kind.I:
                needs[Action(stage, Kind.W, mb)] = {backward}
    return needs


@st.composite
def schedules(
    draw: st.DrawFn,
    *,
    least: int = 1,
    max_ranks: int = 4,
    max_stages: int = 6,
    max_microbatches: int = 4,
    pairs: bool = True,
    recompute: bool = True,
    copies: int = 1,
) -> Schedule:
    """A schedule that can end: a random sequence of all actions in which needs come first, dealt to the ranks.

    Placement is random (any number of stages on a rank), some backwards are split, some pairs overlap, some
    forwards are recomputed. There are `least` ranks, stages and microbatches or more. With several copies of the model
    stages are those of each, and every copy has a microbatch.
    """
    ranks, stages = draw(st.integers(least, max_ranks)), draw(st.integers(least, max_stages))
    microbatches = draw(st.integers(max(least, copies), max_microbatches))
    placement = draw(st.lists(st.integers(0, ranks - 1), min_size=copies * stages, max_size=copies * stages))
    splitting = draw(st.sampled_from([0.0, 0.5, 1.0]))
    pairing = draw(st.sampled_from([0.0, 0.5, 1.0])) if pairs else 0.0
    dice = random.Random(draw(st.integers(0, 2**32)))
    routes = [*range(copies), *(dice.randrange(copies) for _ in range(microbatches - copies))]
    dice.shuffle(routes)
    cells = [(s, b) for s in range(copies * stages) for b in range(microbatches)]
    split = {cell for cell in cells if dice.random() < splitting}
    recomputing = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])) if recompute else 0.0
    again = {cell for cell in cells if dice.random() < recomputing}
    needs = _actions(stages, routes, split, again)
    orders: list[list[Action | OverlappedPair]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        ready = sorted(action for action, wants in needs.items() if action not in done and wants <= done)
        action = dice.choice(ready)
        home = orders[placement[action.stage]]
        partners = [a for a in ready if placement[a.stage] == placement[action.stage] and a.kind == Kind.B]
        if action.kind == Kind.F and partners and dice.random() < pairing:
            partner = dice.choice(partners)
            home.append(OverlappedPair(action, partner))
            done |= {action, partner}
        else:
            home.append(action)
            done.add(action)
    return Schedule.of(orders, name="random", copies=copies)


@st.composite
def communications(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    """The schedule with its sends and receives anywhere they may stand, by any of three rules of thumb.

    A send stands somewhere after what makes it, a receive somewhere before what uses it, the receives of a link in the
    order of its sends. Some of these hang, with some streams or with all.
    """
    slack = draw(st.sampled_from([0, 1, 2, 100]))
    dice = random.Random(draw(st.integers(0, 2**32)))
    program = schedule.program
    messages, row_action = program.messages, program.row_action
    posts: list[list[tuple[int, float, Action]]] = [[] for _ in range(schedule.ranks)]
    sent: dict[int, list[tuple[int, float, int]]] = {}  # link -> place, dice and message of each send
    for k in range(len(messages)):
        source = int(messages.source[k])
        first, last = (int(program.rank_actions[source + end]) for end in (0, 1))
        made = int(row_action[messages.producer[k]]) + 1
        at = (dice.randint(made, min(made + slack, last)) - first, dice.random())
        posts[source].append((*at, program.message_action(k, sending=True)))
        sent.setdefault(int(messages.link[k]), []).append((*at, k))
    for link in sent.values():
        latest, tie = math.inf, 1.0
        for _, _, k in sorted(link, reverse=True):
            destination = int(messages.destination[k])
            used = int(row_action[messages.consumer[k]]) - int(program.rank_actions[destination])
            place = min(latest, dice.randint(max(used - slack, 0), used))
            latest, tie = place, dice.uniform(0, tie)
            posts[destination].append((int(place), tie, program.message_action(k, sending=False)))
    cells = [
        [
            *(
                cell
                for at, action in enumerate(order)
                for cell in [*(post for place, _, post in sorted(own) if place == at), action]
            ),
            *(post for place, _, post in sorted(own) if place == len(order)),
        ]
        for own, order in zip(posts, schedule.orders, strict=True)
    ]
    return Schedule.of(cells, name=schedule.name, copies=schedule.copies)


@st.composite
def offloads(draw: st.DrawFn, schedule: Schedule) -> Schedule:
    """The schedule with some activations moved to host memory and back, anywhere that these copies may stand."""
    moving = draw(st.sampled_from([0.25, 0.5, 1.0]))
    dice = random.Random(draw(st.integers(0, 2**32)))
    copies: list[list[tuple[int, float, Action]]] = [[] for _ in schedule.orders]
    for rank, order in enumerate(schedule.orders):
        places = {
            part: place
            for place, action in enumerate(order)
            for part in ([action] if isinstance(action, Action) else action)
        }
        for part, made in places.items():
            needing = [places.get(Action(part.stage, kind, part.microbatch)) for kind in (Kind.R, Kind.B, Kind.I)]
            needed = min((place for place in needing if place is not None), default=None)
            if part.kind != Kind.F or needed is None or dice.random() >= moving:
                continue
            out, back = sorted(dice.randint(made + 1, needed) for _ in range(2))
            ties = sorted(dice.random() for _ in range(2))
            copies[rank].append((out, ties[0], Action(part.stage, Kind.O, part.microbatch)))
            copies[rank].append((back, ties[1], Action(part.stage, Kind.L, part.microbatch)))
    cells = [
        [
            cell
            for at, action in enumerate([*order, None])
            for cell in [*(copy for place, _, copy in sorted(own) if place == at), action]
            if cell is not None
        ]
        for own, order in zip(copies, schedule.orders, strict=True)
    ]
    return Schedule.of(cells, name=schedule.name, copies=schedule.copies)


def assume_runs(schedule: Schedule, streams: str = "link") -> None:
    """Leave an example out whose schedule hangs."""
    if not _runs(schedule, streams):
        reject()


def _runs(schedule: Schedule, streams: str) -> bool:
    try:
        schedule.check(streams)
    except ScheduleError:
        return False
    return True


@st.composite
def orders_that_may_hang(draw: st.DrawFn) -> list[list[Action | OverlappedPair]]:
    """Complete orders, each in order by itself, whatever that means for the others: about a third of them hang.

    A few actions of a schedule that can end change places: shuffled at random nearly all would hang for many reasons.
    """
    schedule = draw(schedules(least=2, max_ranks=3, max_stages=5, max_microbatches=3))
    orders = [list(order) for order in schedule.orders]
    dice = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(4, 12))):
        order = dice.choice([order for order in orders if order])
        first, second = dice.randrange(len(order)), dice.randrange(len(order))
        order[first], order[second] = order[second], order[first]
        if not _is_in_order(order):
            order[first], order[second] = order[second], order[first]
    return orders


def _is_in_order(order: list[Action | OverlappedPair]) -> bool:
    """F before R, before B or I, before W, of every stage and microbatch."""
    places = {
        part: place
        for place, action in enumerate(order)
        for part in ([action] if isinstance(action, Action) else action)
    }
    needs = {Kind.R: [Kind.F], Kind.B: [Kind.F, Kind.R], Kind.I: [Kind.F, Kind.R], Kind.W: [Kind.I]}
    return all(
        places.get(Action(part.stage, kind, part.microbatch), -1) < place
        for part, place in places.items()
        for kind in needs.get(part.kind, [])
    )


def exact_seconds(most: int = 64) -> st.SearchStrategy[float]:
    """Multiples of 1/16."""
    return st.integers(0, most).map(lambda sixteenths: sixteenths / 16)


def stage_costs(stages: int) -> st.SearchStrategy[list[StageCost]]:
    """Uneven costs, one for each stage."""
    amounts = st.integers(0, 100)
    cost = st.builds(
        StageCost,
        forward_s=exact_seconds(),
        backward_input_s=exact_seconds(),
        backward_weight_s=exact_seconds(),
        backward_s=st.none() | exact_seconds(),
        activation_bytes=amounts,
        weight_activation_bytes=amounts,
        output_bytes=amounts,
        output_gradient_bytes=st.none() | amounts,
        recompute_s=st.none() | exact_seconds(),
        recompute_bytes=st.none() | amounts,
        offload_bytes=st.none() | amounts,
    )
    return st.lists(cost, min_size=stages, max_size=stages)


@st.composite
def links(draw: st.DrawFn, *, most_pieces: int = 3) -> Link:
    """Latency in sixteenths, bandwidth a power of two or unlimited; with more pieces than one a gap, dearer by size."""
    rates = st.sampled_from([1.0, 4.0, 64.0, math.inf])
    first = LinkPiece(
        latency_s=draw(exact_seconds(32)),
        gap_s=draw(exact_seconds(8 if most_pieces > 1 else 0)),
        bytes_per_s=draw(rates),
    )
    pieces = [first]
    for size in sorted(draw(st.sets(st.integers(1, 100), max_size=most_pieces - 1))):
        before = pieces[-1]
        # The latency may fall where the gap rises by more than all that the piece before takes.
        latency_s, least_s = draw(exact_seconds(32)), math.ceil(before.one_way_s(size))
        pieces.append(LinkPiece(from_bytes=size, latency_s=latency_s, gap_s=float(least_s), bytes_per_s=draw(rates)))
    return Link.of(*pieces)


@st.composite
def networks(draw: st.DrawFn, ranks: int, *, most_pieces: int = 3) -> Network:
    """One link for all pairs and others for some."""
    default = draw(links(most_pieces=most_pieces))
    pair = st.tuples(st.integers(0, ranks - 1), st.integers(0, ranks - 1))
    return Network.of(default, draw(st.dictionaries(pair, links(most_pieces=most_pieces), max_size=6)))


def _factors(schedule: Schedule) -> st.SearchStrategy[Any]:
    """A factor for all, for each microbatch, or for each stage and microbatch."""
    factor = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    row = st.lists(factor, min_size=schedule.microbatches, max_size=schedule.microbatches)
    return factor | row | st.lists(row, min_size=schedule.stages, max_size=schedule.stages)


def _each(count: int) -> st.SearchStrategy[Any]:
    """Seconds for all, or for each of so many."""
    return st.sampled_from([0.0, 0.25]) | st.lists(exact_seconds(8), min_size=count, max_size=count)


@st.composite
def conditions(draw: st.DrawFn, schedule: Schedule, *, sharing: tuple[str | None, ...] = (None, "turns", "fair")):
    """Any conditions that fit a schedule; exact numbers where sharing is not fair. sharing: None for no sharing."""
    program, ranks = schedule.program, schedule.ranks
    needed = max(smallest_receive_window(program), 1)
    slow = st.dictionaries(st.integers(0, ranks - 1), st.sampled_from([0.5, 2.0]), max_size=2)
    given: dict[str, Any] = {
        "slow_ranks": draw(st.none() | slow),
        "dispatch_s": draw(_each(program.actions)),
        "send_s": draw(_each(program.actions)),
        "receive_window": draw(st.none() | st.integers(needed, needed + 2))
        if schedule.communication is None and schedule.offload is None
        else None,
        "reduction": draw(st.none() | st.just(Reduction(replicas=2, latency_s=0.5, bytes_per_s=4.0))),
    }
    if given["reduction"] is not None:
        ready = st.lists(exact_seconds(), min_size=schedule.stages, max_size=schedule.stages)
        given["gradients_ready_s"] = draw(st.none() | ready)
    if draw(st.booleans()):
        given["host_link"] = draw(
            st.builds(HostLink, bytes_per_s=st.sampled_from([1.0, 8.0]), latency_s=exact_seconds(8))
        )
    if given["receive_window"] is None:
        given["streams"] = draw(st.sampled_from([s for s in ("link", "pair", "rank") if _runs(schedule, s)]))
    given["blocking"] = draw(st.booleans())
    if draw(st.booleans()):
        rows = len(program.stage)
        given["durations_s"] = draw(st.lists(exact_seconds(), min_size=rows, max_size=rows))
    else:
        given |= {"overlap": draw(st.sampled_from([1.0, 0.75])), "scale": draw(_factors(schedule))}
    if schedule.sharding is not None and draw(st.booleans()):
        given |= {"receive_window": None, "reduction": None, "gradients_ready_s": None}
        given["collectives"] = draw(st.builds(Collectives, replicas=st.integers(1, 3), latency_s=exact_seconds(8)))
    chosen = draw(st.sampled_from(sharing))
    if chosen is not None:
        devices = st.lists(st.integers(0, 1), min_size=ranks, max_size=ranks)
        given |= {"sharing": chosen, "devices": draw(st.none() | devices)}
        if chosen == "fair" and draw(st.booleans()):
            given["speeds"] = draw(st.lists(st.sampled_from([1.0, 0.75, 0.5]), min_size=1, max_size=3))
        else:
            given["cores"] = draw(st.integers(1, 2))
            given["sharing_efficiency"] = draw(st.sampled_from([1.0, 0.75])) if chosen == "fair" else 1.0
    return Conditions(**given)
