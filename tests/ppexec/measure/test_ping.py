"""Ping: what is timed is what travelled, and through the transport that it is given."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ppexec import Session, WorkerPool
from ppexec.measure.link_probe import probe_sizes
from ppexec.measure.ping import Spread, gloo_transport, ping, ping_asleep, slope
from tests.support.remote import on_every_rank, tiny


class _Counting:
    """The runtime's transport, with a note of every message."""

    def __init__(self, inner: Any, notes: list[str]) -> None:
        self._inner, self._notes = inner, notes

    def start(self) -> None:
        self._notes.append("start")
        self._inner.start()

    def send(self, message: int, pending: Any) -> None:
        self._notes.append(f"send {message} {pending.value.nbytes}")
        self._inner.send(message, pending)

    def receive(self, message: int) -> Any:
        pending = self._inner.receive(message)
        self._notes.append(f"receive {message} {pending.value.nbytes}")
        return pending

    def finish(self) -> None:
        self._inner.finish()


def counted(size_bytes: int, rounds: int) -> list[str]:
    notes: list[str] = []
    make = gloo_transport(dist.group.WORLD)
    ping(
        1,
        0,
        size_bytes,
        dist.group.WORLD,
        rounds=rounds,
        make_transport=lambda *arguments: _Counting(make(*arguments), notes),
    )
    return notes


def test_every_message_goes_through_the_given_transport(pool: WorkerPool) -> None:
    receiver, sender = on_every_rank(pool, 2, counted, size_bytes=100, rounds=2)
    # Single ones awake, single ones posted late, bursts of 1, 2, 4 and 8; in 2 rounds and 3 uncounted ones.
    each_round = [1, 1, 1, 2, 4, 8]
    expected = [f"{message} 100" for _ in range(5) for count in each_round for message in range(count)]
    assert [note[5:] for note in sender if note.startswith("send")] == expected
    assert [note[8:] for note in receiver if note.startswith("receive")] == expected
    assert sender.count("start") == receiver.count("start") == 5 * len(each_round)


def test_large_messages_are_sent_in_short_bursts(pool: WorkerPool) -> None:
    _, sender = on_every_rank(pool, 2, counted, size_bytes=20 << 20, rounds=1)
    assert len([note for note in sender if note.startswith("send")]) == 4 * (1 + 1 + 1 + 2)


def sampled(sizes: list[int], clocks_off_ns: list[int]) -> list[dict[str, Any]]:
    offset_ns = clocks_off_ns[dist.get_rank()]
    return [asdict(s) for s in probe_sizes(sizes, dist.group.WORLD, rounds=3, offset_ns=offset_ns)]


def test_every_pair_is_measured_at_every_size_by_its_sender(pool: WorkerPool) -> None:
    by_rank = on_every_rank(pool, 3, sampled, sizes=[1, 4096], clocks_off_ns=[0, 0, 0])
    for rank, samples in enumerate(by_rank):
        others = [other for other in range(3) if other != rank]
        assert [(s["source"], s["destination"], s["size_bytes"]) for s in samples] == [
            (rank, other, size) for size in (1, 4096) for other in others
        ]
        for sample in samples:
            assert sample["asleep"] == sample["bursts"][1]
            assert list(sample["bursts"]) == [1, 2, 4, 8]
            assert sample["occupied_s"] >= 0
            for name in ("asleep", "awake", "late", "send", "post"):
                assert 0 < sample[name]["p25_s"] <= sample[name]["median_s"] <= sample[name]["p75_s"]


def test_times_are_read_on_the_first_ranks_clock(pool: WorkerPool) -> None:
    """A second's offset of the receiver is a second in what crosses ranks, and none in what one rank times."""
    by_rank = on_every_rank(pool, 2, sampled, sizes=[1], clocks_off_ns=[0, 10**9])
    ((forth,), (back,)) = by_rank
    assert 1 <= forth["asleep"]["median_s"] < 2
    assert back["asleep"]["median_s"] == back["awake"]["median_s"] == 0  # there before it was sent: counts as 0
    for sample in (forth, back):
        assert all(sample[name]["median_s"] < 1 for name in ("late", "send", "post"))


def asleep(rounds: int) -> bool:
    return ping_asleep(0, 1, 8, dist.group.WORLD, rounds=rounds) is not None


def test_the_sender_has_the_sample(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, asleep, rounds=1) == [True, False]


def test_a_session_gives_all_samples_by_size_and_link(pool: WorkerPool) -> None:
    with Session(tiny(), pool=pool) as session:
        samples = session.probe_sizes([200, 100], rounds=1)
        with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
            session.probe_sizes([100], rounds=0)
    assert [(s.size_bytes, s.source, s.destination) for s in samples] == [
        (100, 0, 1),
        (100, 1, 0),
        (200, 0, 1),
        (200, 1, 0),
    ]


@given(
    st.floats(0, 1),
    st.floats(1e-6, 1),
    st.lists(st.integers(1, 64), min_size=5, max_size=9, unique=True),
    st.integers(0, 4),
)
def test_the_slope_is_the_lines_even_with_one_point_far_off(
    latency_s: float, occupied_s: float, counts: list[int], place: int
) -> None:
    seconds = [latency_s + occupied_s * count for count in counts]
    assert slope(counts, seconds) == pytest.approx(occupied_s, rel=1e-6)
    seconds[place] += 100
    # Of ten or more slopes at most four can be off; the median lies among the others.
    assert slope(counts, seconds) == pytest.approx(occupied_s, rel=1e-6)


def test_a_spread_is_the_quartiles_and_never_negative() -> None:
    assert Spread.of_ns(np.array([4, 1, 2, 3, 5])) == Spread(p25_s=2e-9, median_s=3e-9, p75_s=4e-9)
    assert Spread.of_ns(np.array([-7, -7])) == Spread(p25_s=0, median_s=0, p75_s=0)
