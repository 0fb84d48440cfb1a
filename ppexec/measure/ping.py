"""Ping: the cost of a message from one rank to another, part by part.

    sender    |send|send|...                    receiver   |post|post|... wait ......|1|2|...|k
              0                                            ready     asleep          one_way_s
                                                                                      later ones: occupied_s each

Messages travel as in a run: through a transport, for a program in which one rank sends and one receives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ppexec.machine.clock import now_ns
from ppexec.machine.device import Pending
from ppexec.models.shapes import TensorSpec
from ppexec.transport.gloo import GlooTransport
from ppexec.transport.transport import MakeTransport, Transport
from ppsim import Program, Schedule
from ppsim.errors import InputError

ASLEEP_S = 0.003
"""After waiting this long a receiver counts as asleep: its core has had time to idle."""
BURSTS = (1, 2, 4, 8)
"""Numbers of messages that are sent at once."""
_BURST_BYTES = 32 << 20  # bursts of more than two messages are left out above this size
_UNCOUNTED = 3  # first rounds, in which buffers are touched and connections set up
_READY_TAG = 1 << 20  # above the tags of all messages of a ping

Times = npt.NDArray[np.int64]
"""Nanoseconds of each round, shape (rounds, times in a round)."""


def gloo_transport(group: dist.ProcessGroup) -> MakeTransport:
    """Make transports that send through gloo, over this group."""

    def make(program: Program, specs: Sequence[TensorSpec], window: int) -> Transport:
        return GlooTransport(program, specs, group=group, window=window)

    return make


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles, in seconds."""

    p25_s: float
    median_s: float
    p75_s: float

    @classmethod
    def of_ns(cls, times: npt.NDArray[Any]) -> Spread:
        """Median and quartiles of nanoseconds. Negative ones, from errors between clocks, count as 0."""
        p25, median, p75 = np.percentile(np.maximum(times, 0) / 1e9, [25, 50, 75]).tolist()
        return cls(p25_s=p25, median_s=median, p75_s=p75)


@dataclass(frozen=True, kw_only=True)
class PingSample:
    """The cost of messages of `size_bytes` from rank `source` to rank `destination`.

    Parameters
    ----------
    source, destination : int
        The link.
    size_bytes : int
        Size of each message.
    asleep : Spread
        From the send to the moment at which the receiver goes on, when it had waited for some milliseconds.
    awake : Spread
        The same, when the receiver had just begun to wait.
    late : Spread
        From the posting of the receive to the moment at which the receiver goes on, when the send came milliseconds
        before. About `awake` if a message waits for its receive (rendezvous), and almost 0 if it does not.
    bursts : dict
        Number of messages sent at once -> from the first send to the arrival of the last, at a sleeping receiver.
    occupied_s : float
        What each further message of a burst adds.
    send, post : Spread
        How long sending a message, and posting a receive, keep the rank from other work.
    """

    source: int
    destination: int
    size_bytes: int
    asleep: Spread
    awake: Spread
    late: Spread
    bursts: dict[int, Spread]
    occupied_s: float
    send: Spread
    post: Spread


def ping(
    source: int,
    destination: int,
    size_bytes: int,
    group: dist.ProcessGroup,
    *,
    rounds: int,
    offset_ns: int = 0,
    make_transport: MakeTransport | None = None,
) -> PingSample | None:
    """Measure one directed link at one size. Its two ends call this at the same time, and no other rank does.

    Kinds of measurement take turns, so that a disturbance affects them alike.

    Parameters
    ----------
    source, destination : int
        The link.
    size_bytes : int
        Size of each message.
    group : ProcessGroup
        Holds both ends.
    rounds : int
        How often each kind of measurement is taken.
    offset_ns : int
        What to add to this rank's clock to read the first rank's.
    make_transport : callable, optional
        Makes what carries the messages; gloo if not given.

    Returns
    -------
    PingSample or None
        None at the receiver.

    Raises
    ------
    InputError
        If `rounds` is below 1.
    """
    counts = [count for count in BURSTS if count <= 2 or count * size_bytes <= _BURST_BYTES]
    ends = {
        count: _End(source, destination, size_bytes, count, group, offset_ns, make_transport or gloo_transport(group))
        for count in counts
    }
    single = ends[1]
    found = _take_turns(
        {
            "awake": partial(single.round, pause_s=0.0),
            "late": single.round_posted_late,
            **{f"burst {count}": partial(end.round, pause_s=ASLEEP_S) for count, end in ends.items()},
        },
        rounds,
    )
    awake, late = single.exchange(found["awake"]), single.exchange(found["late"])
    rows = {count: end.exchange(found[f"burst {count}"]) for count, end in ends.items()}
    if not single.is_sender:
        return None
    bursts = {count: _one_way(sent, there) for count, (sent, there) in rows.items()}
    sends = [np.diff(sent, axis=1).ravel() for sent, _ in rows.values()]
    posts = [(there[:, 1] - there[:, 0]) / count for count, (_, there) in rows.items()]
    return PingSample(
        source=source,
        destination=destination,
        size_bytes=size_bytes,
        asleep=bursts[1],
        awake=_one_way(*awake),
        late=Spread.of_ns(late[1][:, -1] - late[1][:, 0]),
        bursts=bursts,
        occupied_s=slope(list(bursts), [burst.median_s for burst in bursts.values()]),
        send=Spread.of_ns(np.concatenate(sends)),
        post=Spread.of_ns(np.concatenate(posts)),
    )


def ping_asleep(
    source: int,
    destination: int,
    size_bytes: int,
    group: dist.ProcessGroup,
    *,
    rounds: int,
    offset_ns: int = 0,
    make_transport: MakeTransport | None = None,
) -> Spread | None:
    """Measure only what `PingSample.asleep` says of one directed link; see `ping`.

    Parameters
    ----------
    source, destination : int
        The link.
    size_bytes : int
        Size of the message.
    group : ProcessGroup
        Holds both ends.
    rounds : int
        How many messages count.
    offset_ns : int
        What to add to this rank's clock to read the first rank's.
    make_transport : callable, optional
        Makes what carries the messages; gloo if not given.

    Returns
    -------
    Spread or None
        None at the receiver.
    """
    end = _End(source, destination, size_bytes, 1, group, offset_ns, make_transport or gloo_transport(group))
    found = _take_turns({"asleep": partial(end.round, pause_s=ASLEEP_S)}, rounds)
    sent, there = end.exchange(found["asleep"])
    return _one_way(sent, there) if end.is_sender else None


def _take_turns(kinds: dict[str, Callable[[], list[int]]], rounds: int) -> dict[str, Times]:
    """Take `rounds` rounds of every kind in turn, after a few that do not count."""
    if rounds < 1:
        raise InputError(f"rounds must be 1 or more, got {rounds}")
    found: dict[str, list[list[int]]] = {name: [] for name in kinds}
    for _ in range(_UNCOUNTED + rounds):
        for name, measure in kinds.items():
            found[name].append(measure())
    return {name: np.array(rows[_UNCOUNTED:], np.int64) for name, rows in found.items()}


def _one_way(sent: Times, there: Times) -> Spread:
    """From before the first send to the last arrival."""
    return Spread.of_ns(there[:, -1] - sent[:, 0])


def slope(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds that each further message adds: the median slope between every two points (Theil-Sen), at least 0."""
    slopes = [
        (seconds[b] - seconds[a]) / (counts[b] - counts[a])
        for a in range(len(counts))
        for b in range(a + 1, len(counts))
    ]
    return max(float(np.median(slopes)), 0.0)


class _End:
    """One end of a link for bursts of `count` messages. Both ends make the same calls.

    A round gives a list of times in nanoseconds. The sender has 1 + count: before the first send, and after each send.
    The receiver has 2 + count: before and after the posting of its receives, and at the arrival of each message.
    """

    def __init__(
        self,
        source: int,
        destination: int,
        size_bytes: int,
        count: int,
        group: dist.ProcessGroup,
        offset_ns: int,
        make: MakeTransport,
    ) -> None:
        self.is_sender = dist.get_rank(group) == source
        self._peer = destination if self.is_sender else source
        self._count, self._group, self._offset_ns = count, group, offset_ns
        orders: list[list[str]] = [[] for _ in range(max(source, destination) + 1)]
        orders[source] = [f"0F{message}" for message in range(count)]
        orders[destination] = [f"1F{message}" for message in range(count)]
        spec = TensorSpec(shape=(size_bytes,), dtype=torch.uint8)
        self._transport = make(Schedule.of(orders).program, [spec] * count, count)
        self._payload = torch.zeros(size_bytes, dtype=torch.uint8)
        self._token = torch.zeros(1, dtype=torch.uint8)

    def round(self, *, pause_s: float) -> list[int]:
        """Post the receives, let the receiver wait for `pause_s`, then send."""
        if self.is_sender:
            self._await_peer()
            if pause_s:
                time.sleep(pause_s)
            times = self._send_all()
        else:
            times = self._post_all()
            self._tell_peer()
            times += self._receive_all()
        self._transport.finish()
        return times

    def round_posted_late(self) -> list[int]:
        """Send, and post the receives milliseconds later."""
        if self.is_sender:
            times = self._send_all()
            self._tell_peer()
        else:
            self._await_peer()
            time.sleep(ASLEEP_S)
            times = self._post_all() + self._receive_all()
        self._transport.finish()
        return times

    def exchange(self, times: Times) -> tuple[Times, Times]:
        """Bring the receiver's times to the sender: (sender's, receiver's) there; the receiver gets its own twice."""
        if not self.is_sender:
            dist.send(torch.from_numpy(times), group_dst=self._peer, group=self._group)
            return times, times
        there = torch.empty((len(times), 2 + self._count), dtype=torch.int64)
        dist.recv(there, group_src=self._peer, group=self._group)
        return times, there.numpy()

    def _send_all(self) -> list[int]:
        self._transport.start()
        times = [self._now_ns()]
        for message in range(self._count):
            self._transport.send(message, Pending(self._payload))
            times.append(self._now_ns())
        return times

    def _post_all(self) -> list[int]:
        before = self._now_ns()
        self._transport.start()
        return [before, self._now_ns()]

    def _receive_all(self) -> list[int]:
        times = []
        for message in range(self._count):
            self._transport.receive(message)
            times.append(self._now_ns())
        return times

    def _now_ns(self) -> int:
        return now_ns() + self._offset_ns

    def _tell_peer(self) -> None:
        dist.send(self._token, group_dst=self._peer, group=self._group, tag=_READY_TAG)

    def _await_peer(self) -> None:
        dist.recv(self._token, group_src=self._peer, group=self._group, tag=_READY_TAG)
