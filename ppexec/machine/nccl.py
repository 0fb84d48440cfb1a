"""NCCL: what must be set before it starts, and one communicator for each directed link.

Operations of one communicator run one after another. If two ranks each post a send and then a receive on one common
communicator, both wait for ever. So each directed link has its own, and waits for nothing but its own messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ppexec.machine.device import Device

Pair = tuple[int, int]

# NCCL refuses two ranks on one GPU of one host. With a host id each (NCCL_HOSTID, see `prepare_process`) they pass for
# two hosts and talk over sockets.
_FOR_SHARED_GPU = {
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MNNVL_ENABLE": "0",  # what joins GPUs of several hosts without sockets
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_RAS_ENABLE": "0",  # a service that watches hosts
    "NCCL_MAX_CTAS": "2",  # leaves multiprocessors to the computations of all ranks
}

# A receive that is posted ahead spins on the GPU until its message comes. To load a kernel when it is first launched,
# CUDA waits for the GPU to be idle (CUDA programming guide, "Lazy Loading"), so kernels are loaded at the start. A
# computation behind the receive in one hardware queue would wait too, so there are many queues.
_FOR_SPINNING_RECEIVES = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def prepare_process(rank: int, *, shares_gpu: bool) -> None:
    """Set what CUDA and NCCL read when they start in this process.

    Variables that the user has set are kept, but for NCCL_HOSTID. NCCL keeps what it read first (NCCL_PARAM in its
    source), so a process must not go from shared GPUs to GPUs of its own, or back.

    Parameters
    ----------
    rank : int
        The process's rank in the world.
    shares_gpu : bool
        Whether other ranks are on the same GPU.
    """
    for name, value in {**_FOR_SPINNING_RECEIVES, **(_FOR_SHARED_GPU if shares_gpu else {})}.items():
        os.environ.setdefault(name, value)
    if shares_gpu:
        os.environ["NCCL_HOSTID"] = f"rank{rank}"


class LinkGroups:
    """The process groups of directed links, made when first asked for.

    Parameters
    ----------
    pipelines : sequence of sequences of int, shape (pipelines, p)
        The global ranks of every pipeline of the world. All processes of the world must ask for the same links in the
        same sequence.
    device : Device
        The device of a number that is sent once over each new group, so that NCCL connects it.
    timeout_s : float
        After so many seconds without a message the runtime reports which rank waits for which. NCCL's own time-out,
        which ends the process, is twice that.
    """

    def __init__(self, pipelines: Sequence[Sequence[int]], device: Device, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=2 * timeout_s)
        self._pipelines, self._device = [list(line) for line in pipelines], device
        self._groups: dict[Pair, dist.ProcessGroup] = {}
        self._made: set[Pair] = set()

    def open(self, pairs: Iterable[Pair]) -> dict[Pair, tuple[dist.ProcessGroup, int]]:
        """(source, destination) -> the link's group and the other end's rank in it, for the links of this process.

        Sources and destinations are ranks of a pipeline.
        """
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
        """Make the pair's group in every pipeline, and send a number over this process's, so that NCCL connects it."""
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
