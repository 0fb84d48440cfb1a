"""Probe: what a message costs on a link, by ping-pong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from ppexec.clock import now_ns
from ppexec.shapes import TensorSpec
from ppsim import Program

_ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class LinkSample:
    """One way from rank `source` to rank `destination` takes `one_way_s` for a message of `size_bytes`."""

    source: int
    destination: int
    size_bytes: int
    one_way_s: float


def probe_links(program: Program, specs: Sequence[TensorSpec], group: dist.ProcessGroup) -> list[LinkSample]:
    """Half the median round trip between every two ranks that share a link, at the link's own message size.

    Pairs take turns, so that none disturbs another. Collective; gives what this rank measured as the sender.
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
        if rank in (source, destination):
            one_way_s = _ping_pong(rank == source, destination if rank == source else source, size_bytes, group)
            if rank == source:
                samples.append(
                    LinkSample(source=source, destination=destination, size_bytes=size_bytes, one_way_s=one_way_s)
                )
        dist.barrier(group)
    return samples


def _ping_pong(is_source: bool, peer: int, size_bytes: int, group: dist.ProcessGroup) -> float:
    outgoing, incoming = torch.zeros(size_bytes, dtype=torch.uint8), torch.empty(size_bytes, dtype=torch.uint8)
    trips = []
    for _ in range(_ROUNDS):
        receive = dist.irecv(incoming, group_src=peer, group=group)
        began = now_ns()
        if not is_source and receive is not None:
            receive.wait()
        send = dist.isend(outgoing, group_dst=peer, group=group)
        if is_source and receive is not None:
            receive.wait()
        if send is not None:
            send.wait()
        trips.append(now_ns() - began)
    return median(trips[3:]) / 2e9
