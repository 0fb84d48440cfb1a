"""Evaluator: a second, slow answer to what a step is, written from the design's "Exact meanings" and nothing else.

It reads spelled actions ("2F0", "(0F3;3B1)OVERLAP_F_B") and does its sums in fractions. Every time is the recursive
definition of that time; every memory level is counted afresh. It shares no code with the package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

Part = tuple[int, str, int]  # stage, kind, microbatch
Orders = list[list[tuple[Part, ...]]]  # per rank, per action, its one or two parts


def spelled(schedule: Any) -> Orders:
    """The orders of a schedule, by way of their spelling alone."""
    return [[parts(str(action)) for action in order] for order in schedule.orders]


Posts = list[list[str]]  # per rank, its spelled actions, sends and receives as they stand


def cells(text: str) -> Posts:
    """The cells of a CSV text that compute, send or receive."""
    rows = [row.split(",") for row in text.strip("\n").split("\n")]
    return [[cell for cell in row if cell not in ("", '""') and "REDUCE" not in cell] for row in rows]


def queue_of(post: str, rank: int, placement: Sequence[int], streams: str) -> tuple[Any, ...]:
    """The queue of a rank that a spelled post is put into: one per directed link, per other rank, or one for all."""
    stage, verb, direction = re.match(r"(\d+)(SEND|RECV)_([FB])", post).groups()
    towards = 1 if (verb, direction) in {("SEND", "F"), ("RECV", "B")} else -1
    peer = placement[int(stage) + towards]
    return {"link": (rank, verb, peer), "pair": (rank, peer), "rank": (rank,)}[streams]


def other_end(post: str) -> str:
    """The receive of a spelled send, and the send of a receive."""
    stage, verb, direction, microbatch = re.match(r"(\d+)(SEND|RECV)_([FB])(\d+)", post).groups()
    towards = 1 if (verb, direction) in {("SEND", "F"), ("RECV", "B")} else -1
    return f"{int(stage) + towards}{'RECV' if verb == 'SEND' else 'SEND'}_{direction}{microbatch}"


def stuck_on_streams(posts: Posts, placement: Sequence[int], streams: str, copies: int = 1) -> list[int]:
    """The ranks that can never finish where communication runs as written, found by moving tokens.

    A rank posts without waiting. Of each of its queues only the first post runs, and only if the other end of the
    message is first in its queue too; then both are done. An action waits for the receives that bring its inputs.
    """
    stages = len(placement) // copies
    position, queues = [0] * len(posts), {}
    computed: set[str] = set()
    received: set[str] = set()
    first: dict[str, bool] = {}

    def can_run(cell: str) -> bool:
        for stage, kind, microbatch in parts(cell):
            local = {"B": "F", "I": "F", "W": "I", "R": "F"}.get(kind)
            if local and f"{stage}{local}{microbatch}" not in computed:
                return False
            source = stage - 1 if kind == "F" else stage + 1
            if kind in "WR" or not 0 <= source < len(placement) or source // stages != stage // stages:
                continue
            if placement[source] != placement[stage]:
                direction = "F" if kind == "F" else "B"
                if f"{stage}RECV_{direction}{microbatch}" not in received:
                    return False
            elif not computed & {f"{source}{k}{microbatch}" for k in ("F" if kind == "F" else "BI")}:
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(posts):
            while position[rank] < len(row):
                cell = row[position[rank]]
                if "SEND" in cell or "RECV" in cell:
                    queues.setdefault(queue_of(cell, rank, placement, streams), []).append(cell)
                elif can_run(cell):
                    computed.update(f"{s}{k}{b}" for s, k, b in parts(cell))
                else:
                    break
                position[rank] += 1
                moved = True
        first = {queue[0]: True for queue in queues.values() if queue}
        for queue in queues.values():
            if queue and "SEND" in queue[0] and other_end(queue[0]) in first:
                done = {queue[0], other_end(queue[0])}
                received |= done
                for each in queues.values():
                    if each and each[0] in done:
                        each.pop(0)
                moved = True
                break
    return [rank for rank, row in enumerate(posts) if position[rank] < len(row)]


def parts(text: str) -> tuple[Part, ...]:
    """The one or two computations in a spelled action."""
    return tuple((int(stage), kind, int(mb)) for stage, kind, mb in re.findall(r"(\d+)([FBIWR])(\d+)", text))


def source_of(part: Part, stages: int, kinds: dict[tuple[int, int], str]) -> Part | None:
    """The computation on another stage whose result this one takes; kinds: B or I for each (stage, microbatch).

    stages: of one copy of the model, of which the next copy's stages follow.
    """
    stage, kind, microbatch = part
    if kind == "F" and stage % stages > 0:
        return (stage - 1, "F", microbatch)
    if kind in "BI" and stage % stages < stages - 1:
        return (stage + 1, kinds[stage + 1, microbatch], microbatch)
    return None


def backward_kinds(orders: Orders) -> dict[tuple[int, int], str]:
    """Whether the backward of (stage, microbatch) toward its input is B or I."""
    return {(s, b): k for order in orders for action in order for s, k, b in action if k in "BI"}


def messages_of_links(
    orders: Orders, placement: Sequence[int], copies: int = 1
) -> dict[tuple[int, int], list[tuple[Part, Part]]]:
    """Per directed link its (producer, consumer), in the order in which the sender's program produces them."""
    kinds, stages = backward_kinds(orders), len(placement) // copies
    consumers = {
        source_of(part, stages, kinds): part
        for order in orders
        for action in order
        for part in action
        if source_of(part, stages, kinds) is not None
    }
    links: dict[tuple[int, int], list[tuple[Part, Part]]] = {}
    for rank, order in enumerate(orders):
        for action in order:
            for part in action:
                consumer = consumers.get(part)
                if consumer is not None and placement[consumer[0]] != rank:
                    links.setdefault((rank, placement[consumer[0]]), []).append((part, consumer))
    return links


@dataclass
class Answer:
    """starts, ends: per rank, per action. levels: activation bytes per rank after each computation,
    in a pair first with both under way and then after it.

    transfers: (producer, consumer) -> (begun, left, arrived).
    """

    starts: list[list[Fraction]]
    ends: list[list[Fraction]]
    computes: list[Fraction]
    levels: list[list[int]]
    transfers: dict[tuple[Part, Part], tuple[Fraction, Fraction, Fraction]]

    @property
    def makespan(self) -> Fraction:
        return max(e for rank in self.ends for e in rank) - min(s for rank in self.starts for s in rank)

    @property
    def rank_times(self) -> list[Fraction]:
        return [
            max(ends) - min(starts) if ends else Fraction(0)
            for starts, ends in zip(self.starts, self.ends, strict=True)
        ]

    @property
    def bubbles(self) -> list[Fraction]:
        return [self.makespan - compute for compute in self.computes]

    @property
    def bubble_fraction(self) -> Fraction:
        total = len(self.ends) * self.makespan
        return sum(self.bubbles) / total if total else Fraction(0)

    @property
    def peaks(self) -> list[int]:
        return [max(levels, default=0) for levels in self.levels]


def evaluate(
    orders: Orders,
    placement: Sequence[int],
    costs: Sequence[Any],
    network: Any = None,
    overlap: float = 1,
    *,
    factor: Callable[[int, int], float] = lambda stage, microbatch: 1.0,
    dispatch_s: float = 0.0,
    send_s: float = 0.0,
    window: int | None = None,
    posts: Posts | None = None,
    streams: str = "link",
    copies: int = 1,
) -> Answer:
    """The step of `orders`. costs: objects with the fields of a stage's cost. network: `link(source, destination)`.

    factor: on what a (stage, microbatch) takes. dispatch_s: before each action, once it could start. send_s: after
    each action that sends, before its messages set off and its rank goes on. window: receives
    posted ahead on a link; the next is posted whenever one is used, and a transfer waits for its receive. posts: where
    sends and receives stand; a transfer then begins once both are posted and what stands before them in the queues of
    their ranks (see `queue_of`) has left. copies: of the model, whose stages follow each other.
    """
    stages, kinds = len(placement) // copies, backward_kinds(orders)
    links = messages_of_links(orders, placement, copies)
    where = {part: (r, k) for r, order in enumerate(orders) for k, action in enumerate(order) for part in action}

    def streams_of(part: Part) -> tuple[Fraction, Fraction]:
        """Seconds of compute and of communication."""
        cost, kind = costs[part[0]], part[1]
        names = {
            "F": ["forward"],
            "I": ["backward_input"],
            "W": ["backward_weight"],
            "B": ["backward"],
            "R": ["forward"],
        }[kind]
        found = []
        for ending in ("_s", "_communication_s"):
            chosen = names
            if kind == "B" and getattr(cost, f"backward{ending}") is None:
                chosen = ["backward_input", "backward_weight"]
            if kind == "R" and ending == "_s" and cost.recompute_s is not None:
                chosen = ["recompute"]
            given = sum((Fraction(getattr(cost, name + ending)) for name in chosen), Fraction(0))
            found.append(Fraction(factor(part[0], part[2])) * given)
        return found[0], found[1]

    def length(rank: int, index: int) -> Fraction:
        action = orders[rank][index]
        compute, communication = (sum(each, Fraction(0)) for each in zip(*map(streams_of, action), strict=True))
        if len(action) == 1:
            return compute + communication
        return Fraction(overlap) * (max(compute, communication) if communication else compute)

    @cache
    def could_start(rank: int, index: int) -> Fraction:
        inputs = [arrival(part) for part in orders[rank][index]]
        return max([Fraction(0) if index == 0 else free(rank, index - 1), *inputs])

    def start(rank: int, index: int) -> Fraction:
        return could_start(rank, index) + Fraction(dispatch_s)

    def posted(link: tuple[int, int], position: int) -> Fraction:
        """When the receiver had a place for a message: once it had used as many as go before, less the window."""
        if window is None or position < window:
            return Fraction(0)
        uses = sorted(where[consumer] for _, consumer in links[link])
        return could_start(*uses[position - window])

    @cache
    def end(rank: int, index: int) -> Fraction:
        return start(rank, index) + length(rank, index)

    def free(rank: int, index: int) -> Fraction:
        """When a rank has ended an action and handed over its messages."""
        senders = [producer for pairs in links.values() for producer, _ in pairs]
        sends = any(part in senders for part in orders[rank][index])
        return end(rank, index) + (Fraction(send_s) if sends else 0)

    def arrival(part: Part) -> Fraction:
        """When what this computation takes from another stage is there."""
        source = source_of(part, stages, kinds)
        if source is None:
            return Fraction(0)
        if placement[source[0]] == placement[part[0]]:
            return end(*where[source])
        link = (placement[source[0]], placement[part[0]])
        return transfer(link, links[link].index((source, part)))[2]

    places = {cell: (rank, at) for rank, row in enumerate(posts or []) for at, cell in enumerate(row)}

    def spelled_end(pair: tuple[Part, Part], verb: str) -> str:
        stage, kind, microbatch = pair[verb == "RECV"]
        return f"{stage}{verb}_{'F' if kind == 'F' else 'B'}{microbatch}"

    pair_of = {
        spelled_end(pair, verb): (link, k)
        for link, pairs in links.items()
        for k, pair in enumerate(pairs)
        for verb in ("SEND", "RECV")
    }

    def may_begin(post: str) -> Fraction:
        """When a send or receive has been posted, and what stands before it in its queue has left."""
        rank, at = places[post]
        before = posts[rank][:at]
        actions = sum("SEND" not in cell and "RECV" not in cell for cell in before)
        queue = queue_of(post, rank, placement, streams)
        ahead = [
            pair_of[cell]
            for cell in before
            if ("SEND" in cell or "RECV" in cell) and queue_of(cell, rank, placement, streams) == queue
        ]
        return max(
            free(rank, actions - 1) if actions else Fraction(0), transfer(*ahead[-1])[1] if ahead else Fraction(0)
        )

    @cache
    def transfer(link: tuple[int, int], position: int) -> tuple[Fraction, Fraction, Fraction]:
        producer, consumer = links[link][position]
        if posts is not None:
            begun = max(may_begin(spelled_end((producer, consumer), verb)) for verb in ("SEND", "RECV"))
        else:
            begun = max(free(*where[producer]), posted(link, position))
        if position > 0 and posts is None:
            begun = max(begun, transfer(link, position - 1)[1])
        lower = costs[min(producer[0], consumer[0])]
        goes_back = producer[0] > consumer[0] and lower.output_gradient_bytes is not None
        size = lower.output_gradient_bytes if goes_back else lower.output_bytes
        if network is None:
            return begun, begun, begun
        whole = network.link(*link)
        model = max(
            [whole, *(p for p in whole.larger if p.from_bytes <= size)], key=lambda p: getattr(p, "from_bytes", 0)
        )
        left = begun + Fraction(model.gap_s)
        if not math.isinf(model.bytes_per_s):
            left += Fraction(size) / Fraction(model.bytes_per_s)
        return begun, left, left + Fraction(model.latency_s)

    again = {(s, b) for order in orders for action in order for s, k, b in action if k == "R"}

    def least(cost: Any) -> int:
        """What a stage holds of a microbatch between F and R."""
        return (
            min(2 * cost.output_bytes, cost.activation_bytes) if cost.recompute_bytes is None else cost.recompute_bytes
        )

    def level(rank: int, begun: int) -> int:
        """What the rank holds with its first `begun` computations: F and R from their start, others from their end."""
        done = set([part for action in orders[rank] for part in action][:begun])
        total = 0
        for stage, kind, microbatch in done:
            ended = {(stage, "B", microbatch), (stage, "I", microbatch)} & done
            if kind == "F" and not ended:
                waits = (stage, microbatch) in again and (stage, "R", microbatch) not in done
                total += least(costs[stage]) if waits else costs[stage].activation_bytes
            if kind == "I" and (stage, "W", microbatch) not in done:
                total += costs[stage].weight_activation_bytes
        return total

    everything = [[(rank, index) for index in range(len(order))] for rank, order in enumerate(orders)]
    return Answer(
        starts=[[start(*at) for at in rank] for rank in everything],
        ends=[[end(*at) for at in rank] for rank in everything],
        computes=[sum((length(*at) for at in rank), Fraction(0)) for rank in everything],
        levels=[
            [
                level(rank, begun + 1) if kinds else 0 for begun in range(sum(map(len, order)))
            ]  # an evaluation keeps nothing
            for rank, order in enumerate(orders)
        ],
        transfers={pair: transfer(link, k) for link, pairs in links.items() for k, pair in enumerate(pairs)},
    )


def stuck_ranks(orders: Orders, placement: Sequence[int], window: int | None = None, copies: int = 1) -> list[int]:
    """The ranks that can never finish, found by moving tokens until nothing moves.

    window: how many receives of each link are posted and not yet used, in the link's order; None for all. A message
    is there once it was produced, its receive was posted, and all messages before it on the link are there.
    """
    stages, kinds = len(placement) // copies, backward_kinds(orders)
    links = messages_of_links(orders, placement, copies)
    position = [0] * len(orders)
    done: set[Part] = set()

    def is_there(link: tuple[int, int], source: Part, part: Part) -> bool:
        queue = links[link]
        used = sum(consumer in done for _, consumer in queue)
        posted = len(queue) if window is None else used + window
        place = queue.index((source, part))
        return place < posted and all(producer in done for producer, _ in queue[: place + 1])

    def can_run(rank: int) -> bool:
        for part in orders[rank][position[rank]]:
            stage, kind, microbatch = part
            source = source_of(part, stages, kinds)
            local = {"B": "F", "I": "F", "W": "I", "R": "F"}.get(kind)
            if local and (stage, local, microbatch) not in done:
                return False
            if source is None:
                continue
            here, there = placement[stage], placement[source[0]]
            if source not in done if here == there else not is_there((there, here), source, part):
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order) and can_run(rank):
                done.update(order[position[rank]])
                position[rank] += 1
                moved = True
    return [rank for rank, order in enumerate(orders) if position[rank] < len(order)]
