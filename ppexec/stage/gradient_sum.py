"""Reduction: a stage's gradients added up over the replicas, while the pipeline goes on."""

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
"""Tensors of this size and more travel alone. Of smaller ones each costs more than its bytes (16 of 0.1 to 1 MB took
20 to 28 ms on gloo, together 2 to 11 ms), while to copy large ones together costs more than it saves (16 of up to 4 MB:
31 ms alone, 64 ms together)."""
_WARMUP, _ROUNDS = 2, 9


class Reduction:
    """REDUCE_GRAD of one stage, under way from the moment it is made. All replicas must make theirs in the same order.

    gradients: what is added up, in place: it is there once `finish` has returned. Small ones go together as one flat
    message for each dtype. size_bytes: of all of them.
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
        # Noted by the transport's thread as each ends: this rank's is busy with other stages until the step is over.
        is_on_host = all(gradient.device.type == "cpu" for gradient in gradients)
        self._ends = [work.get_future().then(lambda _: now_ns()) for work in works] if is_on_host else []

    def wait(self) -> None:
        """Let the current stream go on, or on the host this thread, when the sums are there."""
        for work in self._works:
            work.wait()
        for gradient, dense in self._strided:
            gradient.copy_(dense)

    def finish(self) -> tuple[int, int]:
        """Wait until the sums are there; on the host, when it began and when the last was there, in nanoseconds."""
        self.wait()
        return self._start_ns, max([self._start_ns, *(ended.wait() for ended in self._ends)])


@dataclass(frozen=True, kw_only=True)
class ReductionSample:
    """Adding up gradients of `size_bytes` over the replicas takes `seconds`."""

    size_bytes: int
    seconds: float


def probe_reduction(
    gradients: Sequence[torch.Tensor], group: dist.ProcessGroup, device: Device | None = None
) -> list[ReductionSample]:
    """What `Reduction` takes for a stage's gradients, half of them and a quarter: medians of what this rank saw.

    gradients: zeros as large as those of the stage; a single tensor is cut, of several some are left out, so that each
    message is one that a step sends, or a part of one. The replicas begin together, with nothing else to do. device:
    where the gradients are, the host unless given. Collective over the group.
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
    """All of them, half and a quarter, of those that hold anything; no part twice."""
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
