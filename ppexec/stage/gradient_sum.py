"""Gradient sum: a stage's gradients added up over the replicas, while the pipeline goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ppexec.machine.clock import now_ns
from ppexec.machine.device import Device

_ALONE_BYTES = 2 << 20
"""Tensors of this size and more are sent alone, and smaller ones together. Measured on gloo: 16 tensors of 0.1 to 1 MB
took 20 to 28 ms alone and 2 to 11 ms together, 16 of up to 4 MB took 31 ms alone and 64 ms together."""
_WARMUP, _ROUNDS = 2, 9


class Reduction:
    """REDUCE_GRAD of one stage. It starts when it is made. All replicas must make theirs in the same order.

    Parameters
    ----------
    gradients : sequence of Tensor
        Added up in place; the sums are there after `wait` or `finish`. Small ones are sent together, as one flat
        message for each dtype.
    group : ProcessGroup
        The ranks that hold the same stage in all replicas.

    Attributes
    ----------
    size_bytes : int
        Of all gradients together.
    """

    def __init__(self, gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        self.size_bytes = sum(gradient.nbytes for gradient in gradients)
        self._start_ns = now_ns()
        self._strided = [(g, g.contiguous()) for g in gradients if not g.is_contiguous()]
        dense_of = {id(gradient): dense for gradient, dense in self._strided}
        together: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        works: list[Any] = []
        for gradient in (dense_of.get(id(gradient), gradient) for gradient in gradients):
            if gradient.nbytes >= _ALONE_BYTES:
                works.append(group.allreduce([gradient]))
            else:
                together[gradient.dtype].append(gradient)
        works += [group.allreduce_coalesced(tensors) for tensors in together.values()]
        self._works = works
        # The transport's thread notes when each ends, since this thread computes other stages until the step is over.
        is_on_host = all(gradient.device.type == "cpu" for gradient in gradients)
        self._ends = [work.get_future().then(lambda _: now_ns()) for work in works] if is_on_host else []

    def wait(self) -> None:
        """Make the current stream, or on the host this thread, wait for the sums."""
        for work in self._works:
            work.wait()
        for gradient, dense in self._strided:
            gradient.copy_(dense)

    def finish(self) -> tuple[int, int]:
        """Wait for the sums; on the host, the times of its start and of the last sum's end, in nanoseconds."""
        self.wait()
        return self._start_ns, max([self._start_ns, *(ended.wait() for ended in self._ends)])


@dataclass(frozen=True, kw_only=True)
class ReductionSample:
    """The time that adding up gradients of this size over the replicas takes."""

    size_bytes: int
    seconds: float


def probe_reduction(
    gradients: Sequence[torch.Tensor], group: dist.ProcessGroup, device: Device | None = None
) -> list[ReductionSample]:
    """Measure what a `Reduction` takes for a stage's gradients, for half of them and for a quarter. Collective.

    Parameters
    ----------
    gradients : sequence of Tensor
        Zeros as large as the stage's gradients. Half of them: a single tensor is cut, of several some are left out, so
        that each message is one of a real step, or a part of one.
    group : ProcessGroup
        The replicas, which start each measurement together and do nothing else.
    device : Device, optional
        Where the gradients are; the host unless given.

    Returns
    -------
    list of ReductionSample
        For each size the median of this rank's times.
    """
    samples = []
    for tensors in _parts(gradients):
        taken_ns = []
        for _ in range(_WARMUP + _ROUNDS):
            dist.barrier(group)
            begin_ns = now_ns()
            Reduction(tensors, group).wait()
            if device is not None:
                device.synchronize()
            taken_ns.append(now_ns() - begin_ns)
        size_bytes = sum(tensor.nbytes for tensor in tensors)
        samples.append(ReductionSample(size_bytes=size_bytes, seconds=median(taken_ns[_WARMUP:]) / 1e9))
    return samples


def _parts(gradients: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """All, half and a quarter of the gradients that are not empty, each size once."""
    held = [gradient for gradient in gradients if gradient.numel()]
    parts: list[list[torch.Tensor]] = []
    for share in (1, 2, 4):
        if len(held) == 1:
            part = [held[0].reshape(-1)[: max(held[0].numel() // share, 1)]]
        else:
            part = held[: -(-len(held) // share)]
        size = sum(map(torch.numel, part))
        if part and size not in [sum(map(torch.numel, other)) for other in parts]:
            parts.append(part)
    return parts
