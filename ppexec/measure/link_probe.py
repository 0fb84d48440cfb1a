"""Link probe: the time of a message on each link of a program, or between all pairs of ranks at given sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

import torch.distributed as dist

from ppexec.measure.ping import PingSample, ping, ping_asleep
from ppexec.models.shapes import TensorSpec
from ppexec.transport.transport import MakeTransport
from ppsim import Program

_ROUNDS = 12
_Sample = TypeVar("_Sample")


@dataclass(frozen=True, kw_only=True)
class LinkSample:
    """A message of `size_bytes` from rank `source` to `destination` takes `one_way_s`, with the receiver's wake-up."""

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
    """Measure a message on every link of a program, at the size of the link's largest message.

    Every rank of the group must call this. The receiver has been waiting for some milliseconds, so that its core
    sleeps, as in a pipeline. The time is from the send to the moment at which the receiver goes on. Most of it is the
    wake-up.

    Parameters
    ----------
    program : Program
        Its links are measured, one after another, so that none disturbs another.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    group : ProcessGroup
        Rank r of the group is rank r of the program.
    offset_ns : int
        What to add to this rank's clock to read the first rank's.
    make_transport : callable, optional
        Makes what carries the messages; gloo if not given.

    Returns
    -------
    list of LinkSample
        Medians of twelve rounds, for the links on which this rank sends.
    """
    sizes: dict[tuple[int, int], int] = {}
    ends = zip(program.messages.source.tolist(), program.messages.destination.tolist(), strict=True)
    for link, spec in zip(ends, specs, strict=True):
        sizes[link] = max(spec.size_bytes, sizes.get(link, 0))

    def measure(source: int, destination: int) -> LinkSample | None:
        size_bytes = sizes[source, destination]
        taken = ping_asleep(
            source,
            destination,
            size_bytes,
            group,
            rounds=_ROUNDS,
            offset_ns=offset_ns,
            make_transport=make_transport,
        )
        if taken is None:
            return None
        return LinkSample(source=source, destination=destination, size_bytes=size_bytes, one_way_s=taken.median_s)

    return _link_by_link(sorted(sizes), group, measure)


def probe_sizes(
    size_bytes: Sequence[int],
    group: dist.ProcessGroup,
    *,
    rounds: int,
    offset_ns: int = 0,
    make_transport: MakeTransport | None = None,
) -> list[PingSample]:
    """Measure every directed link between two ranks of a group at every size. Every rank of the group must call this.

    Parameters
    ----------
    size_bytes : sequence of int
        The sizes of messages.
    group : ProcessGroup
        The ranks. Their links are measured one after another, so that none disturbs another.
    rounds : int
        How often each measurement is taken.
    offset_ns : int
        What to add to this rank's clock to read the first rank's.
    make_transport : callable, optional
        Makes what carries the messages; gloo if not given.

    Returns
    -------
    list of PingSample
        Those of the links on which this rank sends.
    """
    pairs = list(permutations(range(dist.get_world_size(group)), 2))
    samples = []
    for size in size_bytes:

        def measure(source: int, destination: int, size: int = size) -> PingSample | None:
            return ping(
                source, destination, size, group, rounds=rounds, offset_ns=offset_ns, make_transport=make_transport
            )

        samples += _link_by_link(pairs, group, measure)
    return samples


def _link_by_link(
    pairs: Iterable[tuple[int, int]], group: dist.ProcessGroup, measure: Callable[[int, int], _Sample | None]
) -> list[_Sample]:
    """Measure one link after another, at both of its ends. Senders have a sample; those of this rank are returned."""
    samples = []
    for pair in pairs:
        sample = measure(*pair) if dist.get_rank(group) in pair else None
        if sample is not None:
            samples.append(sample)
        dist.barrier(group)  # no two links are measured at once
    return samples
