"""Probe: what a message costs on a link."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from ppexec.clock import now_ns
from ppexec.shapes import TensorSpec
from ppsim import Program

_ROUNDS = 15
_PAUSE_S = 0.003


@dataclass(frozen=True, kw_only=True)
class LinkSample:
    """One way from rank `source` to rank `destination` takes `one_way_s` for a message of `size_bytes`."""

    source: int
    destination: int
    size_bytes: int
    one_way_s: float


def probe_links(
    program: Program, specs: Sequence[TensorSpec], group: dist.ProcessGroup, *, offset_ns: int = 0
) -> list[LinkSample]:
    """The median time of a message between every two ranks that share a link, at the link's own message size.

    The receiver has been asleep in its wait for some milliseconds, as a rank is that waits in a pipeline: what is timed
    is from the send to the receiver's going on, waking up included, which takes longer than the message. Pairs take
    turns, so that none disturbs another. offset_ns: from this rank's clock to the first rank's. Collective; gives what
    this rank measured as the sender.
    """
    rank = dist.get_rank(group)
    samples = []
    sizes = {
        (int(source), int(destination)): specs[message].size_bytes
        for message, (source, destination) in enumerate(
            zip(program.messages.source, program.messages.destination, strict=True)
        )
    }
    for (source, destination), size_bytes in sorted(sizes.items()):
        if rank == source:
            one_way_s = _send_all(destination, size_bytes, group, offset_ns)
            samples.append(
                LinkSample(source=source, destination=destination, size_bytes=size_bytes, one_way_s=one_way_s)
            )
        elif rank == destination:
            _receive_all(source, size_bytes, group, offset_ns)
        dist.barrier(group)
    return samples


def _send_all(peer: int, size_bytes: int, group: dist.ProcessGroup, offset_ns: int) -> float:
    """Send `_ROUNDS` messages and learn when each was there; the median of what they took, in seconds."""
    payload, arrived_ns = torch.zeros(size_bytes, dtype=torch.uint8), torch.zeros(_ROUNDS, dtype=torch.int64)
    sent_ns = []
    for _ in range(_ROUNDS):
        time.sleep(_PAUSE_S)
        sent_ns.append(now_ns() + offset_ns)
        dist.send(payload, group_dst=peer, group=group)
    dist.recv(arrived_ns, group_src=peer, group=group)
    taken = [arrived - sent for arrived, sent in zip(arrived_ns.tolist(), sent_ns, strict=True)]
    return max(median(taken[3:]), 0) / 1e9


def _receive_all(peer: int, size_bytes: int, group: dist.ProcessGroup, offset_ns: int) -> None:
    payload, arrived_ns = torch.empty(size_bytes, dtype=torch.uint8), []
    for _ in range(_ROUNDS):
        dist.recv(payload, group_src=peer, group=group)
        arrived_ns.append(now_ns() + offset_ns)
    dist.send(torch.tensor(arrived_ns, dtype=torch.int64), group_dst=peer, group=group)
