"""NCCL: what must be set before it starts, and one communicator for each directed link.

Operations of one communicator run one after another, so a send that is posted before a receive in both of two ranks
would wait for ever on a common one. On a communicator of its own a link waits for nothing but its own messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ppexec.machine.device import Device

Pair = tuple[int, int]

_SHARED_GPU = {
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_RAS_ENABLE": "0",
    "NCCL_MAX_CTAS": "2",
}
"""NCCL refuses two ranks on one GPU of one host. With a host id each they pass for two hosts and talk over sockets."""


_SPINNING = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""A receive that is posted ahead spins on the GPU until its message comes. Meanwhile no kernel may be loaded for its
first launch, which waits for the GPU to be idle (CUDA programming guide, "Lazy Loading"), and no computation may stand
behind the receive in one hardware queue."""


def prepare_process(rank: int, *, shares_gpu: bool) -> None:
    """Set what CUDA and NCCL read when they start in this process, unless the user has set it.

    shares_gpu: whether other ranks are on the same GPU.
    """
    wanted = {**_SPINNING, **({**_SHARED_GPU, "NCCL_HOSTID": f"rank{rank}"} if shares_gpu else {})}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if shares_gpu:
        os.environ["NCCL_HOSTID"] = f"rank{rank}"  # another rank than in the run before


class LinkGroups:
    """The process groups of directed links, made when first asked for.

    pipelines: the global ranks of every pipeline of the world, shape (pipelines, p): all processes of the world must
    ask for the same links in the same sequence. device: whose streams warm them up. timeout_s: after which the host
    says who waits for whom. NCCL itself, which ends the process, is given twice as long.
    """

    def __init__(self, pipelines: Sequence[Sequence[int]], device: Device, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=2 * timeout_s)
        self._pipelines, self._device = [list(line) for line in pipelines], device
        self._groups: dict[Pair, dist.ProcessGroup] = {}
        self._made: set[Pair] = set()

    def open(self, pairs: Iterable[Pair]) -> dict[Pair, tuple[dist.ProcessGroup, int]]:
        """(source, destination) -> the link's group and the other end's rank in it, for the links of this process."""
        wanted = sorted(set(pairs))
        for pair in wanted:
            if pair not in self._made:
                self._make(pair)
        mine = next(line for line in self._pipelines if dist.get_rank() in line)
        rank = mine.index(dist.get_rank())
        return {
            pair: (group, dist.get_group_rank(group, mine[pair[1] if pair[0] == rank else pair[0]]))
            for pair in wanted
            if (group := self._groups.get(pair)) is not None
        }

    def _make(self, pair: Pair) -> None:
        """Make the pair's group in every pipeline, and send one number over this process's, which connects it."""
        self._made.add(pair)
        for line in self._pipelines:
            group = dist.new_group([line[pair[0]], line[pair[1]]], backend="nccl", timeout=self._timeout)
            if dist.get_rank() in (line[pair[0]], line[pair[1]]):
                self._groups[pair] = group
                is_sender = dist.get_rank() == line[pair[0]]
                peer = dist.get_group_rank(group, line[pair[1]] if is_sender else line[pair[0]])
                number = torch.ones(1, device=self._device.torch_device)
                (group.send if is_sender else group.recv)([number], peer, 0).wait()
        self._device.synchronize()
