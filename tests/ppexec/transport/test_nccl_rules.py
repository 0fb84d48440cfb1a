"""NCCL's rules: every program that passes the check ends on GPUs, whatever they choose to run first.

The real runtime and transport run on a model of GPUs and communicators (`tests.support.nccl_machine`). A kernel that
spins keeps its place on the GPU, so a GPU must have room for enough of them.

Places that suffice on each GPU (with replicas one more, for their sums):
- Always: 1 for the computations and 1 for each directed link that begins or ends there. Each of these runs one kernel
  at a time, so a kernel that is ready always finds a place.
- Where the window holds all messages of every link: 1 for the computations and 1 for each link that ends there. For say
  the GPUs hang, and look at those that are in the earliest step. On one with a free place all receives run, so no send
  to it still runs. One without, full, runs s sends and so the receives of all but s - 1 of its links, or of more. Those
  receives lack their sends. So at most s - 1 running sends lead to it. Summed over the full GPUs fewer running sends
  arrive than leave, but they lead nowhere else: no GPU is full.
Then nothing waits for a place, and what could still wait is a circle that the check finds.
Hardware queues that suffice: one for each stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import ppsim
from ppexec.machine import nccl
from ppexec.machine.device import Device, Pending, Stream
from ppexec.transport.streams import Pair, StreamTransport
from ppsim import Program, Schedule, ScheduleError
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.schedule.streams import Streams
from tests.support.nccl_hosts import COMPUTE, RECEIVE, SEND, FakeDevice, wait_for_ever, write_steps
from tests.support.nccl_machine import Choose, Machine, Outcome
from tests.support.random_programs import adversaries, preferring, valid_schedules
from tests.support.strategies import communications, orders_that_may_hang, schedules

PLENTY = 100
RECEIVES_FIRST = preferring(RECEIVE, SEND, COMPUTE)
SENDS_FIRST = preferring(SEND, RECEIVE, COMPUTE)


def examples(least: int) -> settings:
    return settings(max_examples=max(least, settings().max_examples))


def longest_link(program: Program) -> int:
    return int(program.messages.position.max(initial=-1)) + 1


def places_needed(program: Program, *, window: int, replicas: int = 1) -> list[int]:
    """Of each GPU, as said above."""
    holds_all = window >= longest_link(program)
    links = [
        sum(rank == pair[1] or (rank == pair[0] and not holds_all) for pair in program.links())
        for rank in range(program.ranks)
    ]
    return [1 + count + (replicas > 1) for count in links] * replicas


def run(program: Program, *, window: int, places: int = PLENTY, choose: Choose = RECEIVES_FIRST) -> Outcome:
    """One step on GPUs with so many places each."""
    return Machine(write_steps(program, window=window), places=[places] * program.ranks).run(choose)


@examples(500)
@given(
    schedule=valid_schedules(),
    more=st.sampled_from([0, 0, 1, 2, PLENTY, PLENTY]),
    extra_places=st.sampled_from([0, 0, 1, 2]),
    has_queues=st.booleans(),
    replicas=st.integers(1, 2),
    steps=st.integers(1, 2),
    choose=adversaries(),
)
def test_every_program_ends(
    schedule: Schedule,
    more: int,
    extra_places: int,
    has_queues: bool,
    replicas: int,
    steps: int,
    choose: Choose,
) -> None:
    """With any window from the smallest, and any number of places from those needed."""
    program = schedule.program
    window = max(smallest_receive_window(program), 1) + more
    replicas = 1 if schedule.is_forward_only else replicas
    devices = write_steps(program, window=window, replicas=replicas, steps=steps)
    places = [needed + extra_places for needed in places_needed(program, window=window, replicas=replicas)]
    queues = max(len(device.streams) for device in devices) if has_queues else None
    outcome = Machine(devices, places=places, queues=queues).run(choose)
    assert outcome.circle == ()
    assert outcome.mistaken == ()
    assert all(most <= held for most, held in zip(outcome.most_running, places, strict=True))


COMMUNICATOR_OF: dict[Streams, Callable[[Pair], Hashable]] = {
    "link": lambda pair: pair,
    "pair": frozenset,
    "rank": lambda pair: "all",
}


@pytest.mark.parametrize("streams", ["link", "pair", "rank"])
@examples(100)
@given(data=st.data(), choose=adversaries())
def test_communication_as_written_hangs_exactly_where_the_check_says(
    streams: Streams, data: st.DataObject, choose: Choose
) -> None:
    """On communicators of links, of pairs, and on one of all ranks, each with one stream at each of its ends."""
    schedule = data.draw(schedules(least=2, max_ranks=3, max_stages=4, max_microbatches=3).flatmap(communications))
    assume(schedule.communication is not None)
    devices = write_steps(
        schedule.program, window=None, streams=streams, communicator_of=COMMUNICATOR_OF[streams], steps=1
    )
    outcome = Machine(devices, places=[PLENTY] * schedule.ranks).run(choose)
    try:
        schedule.check(streams)
    except ScheduleError:
        event("hangs")
        assert outcome.circle != ()
    else:
        assert outcome.circle == ()
        assert outcome.mistaken == ()


@examples(200)
@given(orders=orders_that_may_hang(), choose=adversaries())
def test_what_the_check_refuses_hangs_and_nothing_else(orders: list[list[ppsim.Action]], choose: Choose) -> None:
    """An action before one of its own rank that it needs is no matter of waiting: the runtime would fail."""
    schedule = Schedule.of(orders)
    program = schedule.program
    own = np.flatnonzero((program.needs >= 0) & (program.message_in < 0))
    assume((program.needs[own] < own).all())
    outcome = run(program, window=max(smallest_receive_window(program), 1), choose=choose)
    try:
        schedule.check()
    except ScheduleError:
        assert len(outcome.circle) > 1
    else:
        assert outcome.circle == ()


class WaitsForRoom(StreamTransport):
    """With a window that is too small the host waits until there is room for the receive that it needs."""

    def receive(self, message: int) -> Pending:
        if message not in self._posted:
            assert isinstance(self._device, FakeDevice)
            wait_for_ever(self._device, f"receiving message {message}, when one of {sorted(self._posted)} is used")
        return super().receive(message)


@given(schedule=valid_schedules(), choose=adversaries())
def test_no_smaller_window_than_the_check_says_lets_a_program_end(schedule: Schedule, choose: Choose) -> None:
    """A pair may need less: the check lets both of its messages hold their room, the transport gives one free."""
    program = schedule.program
    smallest = smallest_receive_window(program)
    for window in range(1, smallest + 1):
        devices = write_steps(program, window=window, transport=WaitsForRoom)
        ends = not Machine(devices, places=[PLENTY] * program.ranks).run(choose).circle
        if window == smallest or not program.has_pairs:
            assert ends == (window == smallest)


@pytest.mark.parametrize("name", ppsim.schedule_names())
@pytest.mark.parametrize("choose", [RECEIVES_FIRST, SENDS_FIRST])
def test_every_named_schedule_ends_with_what_is_least(name: str, choose: Choose) -> None:
    """With the fewest places and hardware queues for the smallest window; a run has more queues than that."""
    program = ppsim.build_schedule(name, ranks=4, microbatches=8).program
    window = smallest_receive_window(program)
    devices = write_steps(program, window=window, replicas=2)
    queues = max(len(device.streams) for device in devices)
    assert queues < int(nccl._FOR_SPINNING_RECEIVES["CUDA_DEVICE_MAX_CONNECTIONS"])
    places = places_needed(program, window=window, replicas=2)
    assert Machine(devices, places=places, queues=queues).run(choose).circle == ()


# What hangs, and the circle

FORWARDS_FIRST = ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1"]
# Rank 0 sends F2 and F3 while rank 1 sends B0 and B1, and neither has consumed what would free the other's place.
BOTH_SEND_FIRST = ["0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3", "1F0,1F1,1B0,1B1,1F2,1F3,1B2,1B3"]
# Both of rank 0's outputs go to rank 1, which uses them the other way round.
OTHER_WAY_ROUND = ["0F0,0F1,0F2,0B2,0B1,0B0", "1F2,1F1,1F0,1B2,1B0,1B1"]
# Rank 0 sends 3F1 long before rank 1 uses 3F0 and so has room for it: rank 1 first needs 1F2, and that 0F2.
USED_LATE = ["0F0,0F1,3F0,3F1,0F2,3F2", "2F0,2F1,2F2,4F0,4F1,4F2", "1F0,1F1,1F2"]


# Ends the circles of FORWARDS_FIRST in which 0F0 waits for the place or the queue of rank 0's first receive.
FIRST_BACKWARD_WAITS_FOR_FIRST_FORWARD = (
    "rank 0 receiving message 2 from rank 1 (1B0) spins until it meets: rank 1 sending message 2 to rank 0 (1B0)",
    "rank 1 sending message 2 to rank 0 (1B0) waits for: rank 1, action 1B0",
    "rank 1, action 1B0 stands behind: rank 1, action 1F1",
    "rank 1, action 1F1 stands behind: rank 1, action 1F0",
    "rank 1, action 1F0 waits for: rank 1 receiving message 0 from rank 0 (0F0)",
    "rank 1 receiving message 0 from rank 0 (0F0) spins until it meets: rank 0 sending message 0 to rank 1 (0F0)",
    "rank 0 sending message 0 to rank 1 (0F0) waits for: rank 0, action 0F0",
)


def circle_of(
    rows: list[str],
    *,
    window: int = 1,
    places: Sequence[int] = (PLENTY,) * 3,
    queues: int | None = None,
    **different: Any,
) -> tuple[str, ...]:
    """Of one step that passes the check. different: what `write_steps` is to do otherwise."""
    schedule = Schedule.of([row.split(",") for row in rows])
    schedule.check()
    assert window >= smallest_receive_window(schedule.program) or different
    devices = write_steps(schedule.program, window=window, **different)
    return Machine(devices, places=places, queues=queues).run(RECEIVES_FIRST).circle


class Rewired(StreamTransport):
    """Links on other streams than their own."""

    def __init__(self, *arguments: Any, rank: int, device: Device, compute: Stream, **more: Any) -> None:
        super().__init__(*arguments, rank=rank, device=device, compute=compute, **more)
        for pair in self._streams:
            self._rewire(pair, is_sender=pair[0] == rank)

    def _rewire(self, pair: Pair, *, is_sender: bool) -> None:
        raise NotImplementedError


class OneStreamForReceives(Rewired):
    """All receives of a rank run one after the other."""

    def _rewire(self, pair: Pair, *, is_sender: bool) -> None:
        if not is_sender:
            self._streams[pair] = self._device.stream("receives")


class SendsAmongComputations(Rewired):
    """The next computation waits until what is sent before it has left."""

    def _rewire(self, pair: Pair, *, is_sender: bool) -> None:
        if is_sender:
            self._streams[pair] = self._compute


class InOrderOfUse(StreamTransport):
    """Receives of a link are posted in the order in which they are used, not in that in which they are sent."""

    def __init__(self, program: Program, *arguments: Any, **more: Any) -> None:
        super().__init__(program, *arguments, **more)
        for messages in self._incoming.values():
            messages.sort(key=lambda message: program.messages.consumer[message])


def test_one_communicator_for_both_directions_hangs() -> None:
    """Each end posts a receive first, and its send stands behind."""
    assert circle_of(FORWARDS_FIRST, communicator_of=frozenset) == (
        "rank 0 receiving message 2 from rank 1 (1B0) spins until it meets: rank 1 sending message 2 to rank 0 (1B0)",
        "rank 1 sending message 2 to rank 0 (1B0) stands behind: rank 1 receiving message 1 from rank 0 (0F1)",
        "rank 1 receiving message 1 from rank 0 (0F1) stands behind: rank 1 receiving message 0 from rank 0 (0F0)",
        "rank 1 receiving message 0 from rank 0 (0F0) spins until it meets: rank 0 sending message 0 to rank 1 (0F0)",
        "rank 0 sending message 0 to rank 1 (0F0) stands behind: rank 0 receiving message 2 from rank 1 (1B0)",
    )


def test_one_stream_for_the_receives_of_all_links_hangs() -> None:
    """Rank 1 receives 2B0 before 0F1, although rank 2 needs the result of 0F1 for it."""
    rows = [*FORWARDS_FIRST, "2F0,2F1,2B0,2B1"]
    assert circle_of(rows) == ()
    assert circle_of(rows, transport=OneStreamForReceives) == (
        "rank 1, action 1F1 waits for: rank 1 receiving message 1 from rank 0 (0F1)",
        "rank 1 receiving message 1 from rank 0 (0F1) waits for: rank 1 receiving message 6 from rank 2 (2B0)",
        "rank 1 receiving message 6 from rank 2 (2B0) spins until it meets: rank 2 sending message 6 to rank 1 (2B0)",
        "rank 2 sending message 6 to rank 1 (2B0) waits for: rank 2, action 2B0",
        "rank 2, action 2B0 stands behind: rank 2, action 2F1",
        "rank 2, action 2F1 waits for: rank 2 receiving message 5 from rank 1 (1F1)",
        "rank 2 receiving message 5 from rank 1 (1F1) spins until it meets: rank 1 sending message 5 to rank 2 (1F1)",
        "rank 1 sending message 5 to rank 2 (1F1) waits for: rank 1, action 1F1",
    )


def test_computations_that_wait_for_sends_hang() -> None:
    assert circle_of(BOTH_SEND_FIRST) == ()
    assert circle_of(BOTH_SEND_FIRST, transport=SendsAmongComputations) == (
        "rank 0 sending message 3 to rank 1 (0F3) spins until it meets: rank 1 receiving message 3 from rank 0 (0F3)",
        "rank 1 receiving message 3 from rank 0 (0F3) waits for: rank 1 sending message 5 to rank 0 (1B1)",
        "rank 1 sending message 5 to rank 0 (1B1) spins until it meets: rank 0 receiving message 5 from rank 1 (1B1)",
        "rank 0 receiving message 5 from rank 1 (1B1) waits for: rank 0 sending message 3 to rank 1 (0F3)",
    )


def test_receives_in_another_order_than_the_sends_get_each_others_messages() -> None:
    """NCCL knows no tags: nothing hangs, and nobody is told."""
    program = Schedule.of([row.split(",") for row in OTHER_WAY_ROUND]).program
    assert run(program, window=3).mistaken == ()
    devices = write_steps(program, window=3, transport=InOrderOfUse)
    outcome = Machine(devices, places=[PLENTY] * 2).run(RECEIVES_FIRST)
    assert outcome.circle == ()
    assert outcome.mistaken[0] == (
        "rank 0 sending message 0 to rank 1 (0F0) met rank 1 receiving message 2 from rank 0 (0F2)"
    )


def test_a_window_that_is_too_small_hangs() -> None:
    """Rank 1 needs the third message first, and has room for two. The real transport fails at once."""
    assert circle_of(OTHER_WAY_ROUND, window=3) == ()
    assert circle_of(OTHER_WAY_ROUND, window=2, transport=WaitsForRoom) == (
        "the host of rank 1 waits for: rank 1 receiving message 2, when one of [0, 1] is used",
        "rank 1 receiving message 2, when one of [0, 1] is used is not submitted by its host",
    )
    with pytest.raises(KeyError):
        circle_of(OTHER_WAY_ROUND, window=2, transport=StreamTransport, steps=1)


def test_a_receive_in_the_only_place_hangs() -> None:
    """Rank 0 has one link that ends there and one place, which its receive takes before anything is computed."""
    assert circle_of(FORWARDS_FIRST, window=2, places=[2, 2]) == ()
    assert circle_of(FORWARDS_FIRST, window=2, places=[1, 2]) == (
        "rank 0, action 0F0 finds no place, one is held by: rank 0 receiving message 2 from rank 1 (1B0)",
        *FIRST_BACKWARD_WAITS_FOR_FIRST_FORWARD,
    )


def test_a_send_whose_receive_is_not_posted_yet_takes_a_place_too() -> None:
    """Rank 0 sends 3F1, which rank 1 has no room for before 0F2 is computed. With room, two places are enough."""
    assert circle_of(USED_LATE, window=1, places=[3, PLENTY, PLENTY]) == ()
    assert circle_of(USED_LATE, window=3, places=[2, PLENTY, PLENTY]) == ()
    assert circle_of(USED_LATE, window=1, places=[2, PLENTY, PLENTY]) == (
        "rank 0, action 0F2 finds no place, one is held by: rank 0 receiving message 8 from rank 1 (2F2)",
        "rank 0 receiving message 8 from rank 1 (2F2) spins until it meets: rank 1 sending message 8 to rank 0 (2F2)",
        "rank 1 sending message 8 to rank 0 (2F2) waits for: rank 1, action 2F2",
        "rank 1, action 2F2 waits for: rank 1 receiving message 11 from rank 2 (1F2)",
        "rank 1 receiving message 11 from rank 2 (1F2) spins until it meets: rank 2 sending message 11 to rank 1 (1F2)",
        "rank 2 sending message 11 to rank 1 (1F2) waits for: rank 2, action 1F2",
        "rank 2, action 1F2 waits for: rank 2 receiving message 5 from rank 0 (0F2)",
        "rank 2 receiving message 5 from rank 0 (0F2) spins until it meets: rank 0 sending message 5 to rank 2 (0F2)",
        "rank 0 sending message 5 to rank 2 (0F2) waits for: rank 0, action 0F2",
    )


@pytest.mark.parametrize("queues", [1, 2])
def test_a_computation_behind_a_receive_in_one_hardware_queue_hangs(queues: int) -> None:
    assert circle_of(FORWARDS_FIRST, window=2, queues=5) == ()  # compute, two links, two communicators
    assert circle_of(FORWARDS_FIRST, window=2, queues=queues) == (
        "rank 0, action 0F0 stands in one hardware queue behind: rank 0 receiving message 3 from rank 1 (1B1)",
        "rank 0 receiving message 3 from rank 1 (1B1) stands behind: rank 0 receiving message 2 from rank 1 (1B0)",
        *FIRST_BACKWARD_WAITS_FOR_FIRST_FORWARD,
    )


def test_a_send_that_nobody_receives_is_named() -> None:
    class ForgetsReceives(StreamTransport):
        def start(self) -> None:
            super().start()
            self._to_post = {pair: deque() for pair in self._to_post}

        def receive(self, message: int) -> Pending:
            return super().receive(message) if message in self._posted else Pending()

    assert circle_of(FORWARDS_FIRST, transport=ForgetsReceives)[-1] == (
        "rank 1 sending message 3 to rank 0 (1B1) spins for what the host of rank 0 never posts"
    )
