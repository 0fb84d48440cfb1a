"""Probe: what a message costs on the links of a program, or on all links by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ppexec.measure.ping import PingSample, ping, ping_asleep
from ppexec.models.shapes import TensorSpec
from ppexec.transport.transport import MakeTransport
from ppsim import Program

_ROUNDS = 12


@dataclass(frozen=True, kw_only=True)
class LinkSample:
    """One way from rank `source` to rank `destination` takes `one_way_s` for a message of `size_bytes`."""

    source: int
    destination: int
    size_bytes: int
    one_way_s: float


def probe_links(
    program: Program,
    specs: Sequence[TensorSpec],
    group: dist.ProcessGroup,
    *,
    offset_ns: int = 0,
    make_transport: MakeTransport | None = None,
) -> list[LinkSample]:
    """The median time of a message between every two ranks that share a link, at the link's own message size.

    The receiver has been asleep in its wait for some milliseconds, as a rank is that waits in a pipeline: what is timed
    is from the send to the receiver's going on, waking up included, which takes longer than the message. Pairs take
    turns, so that none disturbs another. offset_ns: from this rank's clock to the first rank's. Collective; gives what
    this rank measured as the sender.
    """
    samples = []
    sizes = {
        (int(source), int(destination)): specs[message].size_bytes
        for message, (source, destination) in enumerate(
            zip(program.messages.source, program.messages.destination, strict=True)
        )
    }
    for (source, destination), size_bytes in sorted(sizes.items()):
        if dist.get_rank(group) in (source, destination):
            taken = ping_asleep(
                source,
                destination,
                size_bytes,
                group,
                rounds=_ROUNDS,
                offset_ns=offset_ns,
                make_transport=make_transport,
            )
            if taken is not None:
                samples.append(
                    LinkSample(source=source, destination=destination, size_bytes=size_bytes, one_way_s=taken.median_s)
                )
        dist.barrier(group)
    return samples


def probe_sizes(
    size_bytes: Sequence[int],
    group: dist.ProcessGroup,
    *,
    rounds: int,
    offset_ns: int = 0,
    make_transport: MakeTransport | None = None,
) -> list[PingSample]:
    """Every directed link between two ranks of the group at every size; see `ping`.

    Pairs take turns, so that none disturbs another. Collective; gives what this rank measured as the sender.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    samples = []
    for size in size_bytes:
        for source in range(ranks):
            for destination in range(ranks):
                if source == destination:
                    continue
                if rank in (source, destination):
                    sample = ping(
                        source,
                        destination,
                        size,
                        group,
                        rounds=rounds,
                        offset_ns=offset_ns,
                        make_transport=make_transport,
                    )
                    samples += [] if sample is None else [sample]
                dist.barrier(group)
    return samples
