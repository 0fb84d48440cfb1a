"""Sharded optimizer: replicas that each update some of the parameters, and then get the others (ZeRO-1).

Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stage 1. Here a
parameter tensor has one owner as a whole, so that the update of each is what it is without sharding, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ppexec.stage.tensor_parallel import local


def owners(parameters: Sequence[nn.Parameter], replicas: int) -> list[int]:
    """Which replica updates each parameter: the largest ones first, each to the replica that has least so far.

    Every replica comes to the same answer, as it depends on sizes and the sequence alone.
    """
    sizes = [local(parameter).numel() for parameter in parameters]
    held = [0] * replicas
    found = [0] * len(parameters)
    for at in sorted(range(len(parameters)), key=lambda at: -sizes[at]):
        found[at] = min(range(replicas), key=held.__getitem__)
        held[found[at]] += sizes[at]
    return found


def hand_out(parameters: Sequence[nn.Parameter], owner: Sequence[int], group: dist.ProcessGroup) -> None:
    """Give every replica each parameter as its owner has it. Collective over the replicas.

    One message for each owner and type of numbers.
    """
    tensors = [local(parameter).detach() for parameter in parameters]
    for replica in range(dist.get_world_size(group)):
        of_replica = [tensor for tensor, has in zip(tensors, owner, strict=True) if has == replica]
        for dtype in dict.fromkeys(tensor.dtype for tensor in of_replica):
            alike = [tensor for tensor in of_replica if tensor.dtype == dtype]
            joined = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.broadcast(joined, src=dist.get_global_rank(group, replica), group=group)
            for tensor, values in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(values.view_as(tensor))
