"""Sharded: a stage's parameters sharded over the replicas by PyTorch's `fully_shard`, gathered and let go by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ppexec.machine.clock import now_ns

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_WARMUP, _ROUNDS = 2, 9


class _Layers(nn.Module):
    """Holds the layers of a stage, which are called one by one."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> None:
        """Never called: `fully_shard` wants a module that can be."""
        raise RuntimeError("a stage calls its layers itself")


class ShardedParameters:
    """The parameters of a stage, of which each replica holds a share. All replicas must call its methods alike.

    Parameters
    ----------
    layers : sequence of Module
        The stage's. Their parameters become shares (DTensor), and plain tensors while they are whole.
    mesh : DeviceMesh
        Of the dp dimension.

    Attributes
    ----------
    gathered_ns : list of (int, int)
        When each gathering began, and when it was seen to be done.
    full_bytes : int
        Bytes of the whole parameters.

    Notes
    -----
    `fully_shard` gathers and reduces in hooks of the forward and backward of the module that it is given. That module
    is never called here, so nothing happens but what the schedule says. All parameters of the stage are gathered at
    once, and so are their gradients reduced, as sums: a microbatch's loss counts its share of the step's already. The
    calls are those of torch.distributed.pipelining's runtime (UNSHARD, RESHARD, REDUCE_GRAD).
    """

    def __init__(self, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import fully_shard

        self._module: Any = fully_shard(_Layers(layers), mesh=mesh, reshard_after_forward=False)
        self._module.set_gradient_divide_factor(1.0)
        self._module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        self._module.set_reshard_after_backward(False)
        self._state = self._module._get_fsdp_state()
        self._state._lazy_init()
        self._pending: tuple[Any, int] | None = None
        self.gathered_ns: list[tuple[int, int]] = []
        self.full_bytes = 0
        self.unshard()  # so that whole parameters have their storages from now on
        self.full_bytes = self.whole_bytes
        self.reshard()
        self.gathered_ns.clear()

    @property
    def _parameters(self) -> list[Any]:
        return [each for group in self._state._fsdp_param_groups for each in group.fsdp_params]

    @property
    def whole(self) -> list[torch.Tensor]:
        """The parameters that are whole between UNSHARD and RESHARD; without memory otherwise."""
        return [each._unsharded_param for each in self._parameters]

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole parameters now, from UNSHARD on.

        Where parameters do not divide evenly, their slices are padded, and so is the whole.
        """
        if self._pending is not None:
            return self.full_bytes
        return sum(tensor.untyped_storage().nbytes() for tensor in self.whole)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients now: whole before they are reduced, this replica's share after that."""
        whole = [tensor.grad for tensor in self.whole]
        shares = [each.sharded_param.grad for each in self._parameters]
        found = [*whole, *(None if share is None else share.to_local() for share in shares)]
        return sum(gradient.nbytes for gradient in found if gradient is not None)

    def start_unshard(self) -> None:
        """UNSHARD: start to gather the parameters."""
        self._pending = self._module.unshard(async_op=True), now_ns()

    def wait(self) -> None:
        """Wait until the parameters are whole, if they are being gathered."""
        if self._pending is not None:
            handle, begin_ns = self._pending
            handle.wait()
            self._pending = None
            self.gathered_ns.append((begin_ns, now_ns()))

    def unshard(self) -> None:
        """Gather the parameters, and wait for them."""
        self.start_unshard()
        self.wait()

    def reshard(self) -> None:
        """RESHARD: keep the share alone."""
        self.wait()
        self._module.reshard()

    def reduce(self) -> tuple[int, int, int]:
        """REDUCE_GRAD: add up the gradients, and keep this replica's share of the sums.

        Returns
        -------
        start_ns, end_ns, size_bytes : int
            When it began and ended, and the bytes of the gradients.
        """
        size_bytes = sum(tensor.grad.nbytes for tensor in self.whole if tensor.grad is not None)
        begin_ns = now_ns()
        for group in self._state._fsdp_param_groups:
            group.post_backward()
        self._state._root_post_backward_final_callback()
        return begin_ns, now_ns(), size_bytes

    def clear(self) -> None:
        """Forget all gradients."""
        for each in self._parameters:
            each._unsharded_param.grad = each.sharded_param.grad = None


@dataclass(frozen=True, kw_only=True)
class ShardingSample:
    """What gathering a stage's parameters and reducing its gradients takes, and the bytes of it on this replica.

    Parameters
    ----------
    unshard_s, reduce_s : float
        Seconds of UNSHARD and REDUCE_GRAD.
    whole_bytes : int
        Of the gathered parameters.
    gradient_share_bytes : int
        Of the gradients that this replica keeps.
    """

    unshard_s: float
    reduce_s: float
    whole_bytes: int
    gradient_share_bytes: int


def probe_sharding(sharded: ShardedParameters, group: dist.ProcessGroup) -> ShardingSample:
    """Measure UNSHARD and REDUCE_GRAD of a stage, with gradients of zeros. Collective.

    Parameters
    ----------
    sharded : ShardedParameters
        Of the stage; without gradients before and afterwards.
    group : ProcessGroup
        The replicas, which start each measurement together and do nothing else.

    Returns
    -------
    ShardingSample
        Medians of this rank's times.
    """
    unshard_ns, reduce_ns, share_bytes = [], [], 0
    for _ in range(_WARMUP + _ROUNDS):
        dist.barrier(group)
        begin_ns = now_ns()
        sharded.unshard()
        unshard_ns.append(now_ns() - begin_ns)
        for parameter in sharded.whole:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        dist.barrier(group)
        begin_ns, end_ns, _ = sharded.reduce()
        reduce_ns.append(end_ns - begin_ns)
        share_bytes = sharded.gradient_bytes
        sharded.clear()
        sharded.reshard()
    sharded.gathered_ns.clear()
    return ShardingSample(
        unshard_s=median(unshard_ns[_WARMUP:]) / 1e9,
        reduce_s=median(reduce_ns[_WARMUP:]) / 1e9,
        whole_bytes=sharded.full_bytes,
        gradient_share_bytes=share_bytes,
    )
