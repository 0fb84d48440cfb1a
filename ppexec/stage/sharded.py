"""Sharded: a stage's parameters as shares of replicas, by PyTorch's `fully_shard`, gathered and freed as scheduled."""

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
        """Never called: `fully_shard` requires a module with a forward."""
        raise RuntimeError("a stage calls its layers itself")


class ShardedParameters:
    """The parameters of a stage, of which each replica holds a share.

    Its methods are collective: all replicas must call the same ones in the same sequence. It works with gloo on CPUs
    only, where the host's times are those of the work.

    Parameters
    ----------
    layers : sequence of Module
        The layers of the stage. Their parameters become shares (DTensor), and plain tensors while they are gathered.
    mesh : DeviceMesh
        The data-parallel replicas.

    Attributes
    ----------
    gathered_ns : list of (int, int)
        When each gathering began, and when `wait` returned, which may be later than its end.
    full_bytes : int
        Bytes of all parameters when they are gathered.

    Notes
    -----
    `fully_shard` gathers and reduces in hooks of the forward and backward of the module that it is given. That module
    is never called here, so nothing happens but what the schedule says. All parameters of the stage are gathered at
    once, and their gradients are reduced at once. Gradients are summed, not averaged, since the loss of a microbatch is
    scaled by its share of the step already. The calls are those of torch.distributed.pipelining's runtime (UNSHARD,
    RESHARD, REDUCE_GRAD).
    """

    def __init__(self, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import fully_shard

        self._module: Any = fully_shard(_Layers(layers), mesh=mesh, reshard_after_forward=False)
        self._module.set_gradient_divide_factor(1.0)
        self._module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        self._module.set_reshard_after_backward(False)
        self._state = self._module._get_fsdp_state()
        self._state._lazy_init()  # the first forward would do this, and it is never called
        self._pending: tuple[Any, int] | None = None
        self.gathered_ns: list[tuple[int, int]] = []
        self.full_bytes = 0
        self.unshard()  # allocates the tensors that `whole` reads
        self.full_bytes = self.gathered_bytes
        self.reshard()
        self.gathered_ns.clear()

    @property
    def _parameters(self) -> list[Any]:
        return [each for group in self._state._fsdp_param_groups for each in group.fsdp_params]

    @property
    def whole(self) -> list[torch.Tensor]:
        """The gathered parameters. Before UNSHARD and after RESHARD they have no memory."""
        return [each._unsharded_param for each in self._parameters]

    @property
    def gathered_bytes(self) -> int:
        """Bytes that gathered parameters hold now: `full_bytes` from UNSHARD to RESHARD, else 0.

        If parameters do not divide evenly, their slices are padded, and so are the gathered ones.
        """
        if self._pending is not None:  # their memory is allocated when gathering starts
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
        """Wait until the parameters are gathered, if they are being gathered."""
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
        """RESHARD: free the gathered parameters and keep this replica's share."""
        self.wait()
        self._module.reshard()

    def reduce(self) -> tuple[int, int, int]:
        """REDUCE_GRAD: add up the gradients, and keep this replica's share of the sums.

        Returns
        -------
        begin_ns, end_ns, size_bytes : int
            When it began and ended, and the bytes of the gradients before the reduction.
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
    """The times to gather a stage's parameters and to reduce its gradients, and their bytes on this replica.

    Parameters
    ----------
    unshard_s, reduce_s : float
        Seconds of UNSHARD and REDUCE_GRAD.
    full_bytes : int
        Bytes of the gathered parameters.
    gradient_share_bytes : int
        Bytes of the gradients that this replica keeps.
    """

    unshard_s: float
    reduce_s: float
    full_bytes: int
    gradient_share_bytes: int


def probe_sharding(sharded: ShardedParameters, group: dist.ProcessGroup) -> ShardingSample:
    """Measure UNSHARD and REDUCE_GRAD of a stage, with gradients of zeros. Collective.

    Parameters
    ----------
    sharded : ShardedParameters
        The stage's parameters, without gradients before and afterwards.
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
        full_bytes=sharded.full_bytes,
        gradient_share_bytes=share_bytes,
    )
