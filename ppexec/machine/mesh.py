"""Mesh: the processes of a run as one world, laid out as a DeviceMesh with the dimensions dp, pp and tp."""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ppsim.errors import InputError

WORLD_BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl", "local": "gloo"}
"""The backend of a world, by the run's backend. Objects and barriers go over gloo, tensors on GPUs over NCCL."""


_Cached = type(functools.lru_cache(int))
_SHARDED = "torch.distributed.tensor"


def join_world(*, rank: int, world_size: int, store: dist.Store, backend: str, timeout_s: float) -> None:
    """Join a world, after leaving the one that this process was in before. Collective.

    Parameters
    ----------
    rank : int
        This process's number in the world.
    world_size : int
        Number of processes.
    store : Store
        Where the processes find each other.
    backend : str
        The run's backend: "gloo", "nccl" or "local".
    timeout_s : float
        Seconds that a message or a collective may take.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_worlds()
    hook = sys.excepthook
    dist.init_process_group(
        WORLD_BACKENDS[backend], store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    # PyTorch's hook writes the rank before an uncaught exception. It calls the last world's, so they would be a chain.
    sys.excepthook = hook


def build_mesh(*, dp: int, pp: int, tp: int, device_type: str = "cpu") -> DeviceMesh:
    """Lay out all processes of the world as a mesh. Collective.

    The ranks of tp exchange the most. So tp is the innermost dimension, which puts them on one machine where possible.

    Parameters
    ----------
    dp, pp, tp : int
        Number of replicas, of ranks in a pipeline, and of tensor-parallel ranks.
    device_type : str
        "cpu" or "cuda".

    Returns
    -------
    DeviceMesh
        With the dimensions "dp", "pp" and "tp".

    Raises
    ------
    InputError
        If the world does not have dp * pp * tp processes.
    """
    world = dist.get_world_size()
    if dp * pp * tp != world:
        raise InputError(
            f"dp {dp} x ranks {pp} x tp {tp} needs {dp * pp * tp} processes, there are {world}: start that many"
        )
    return init_device_mesh(device_type, (dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))


def meet(mesh: DeviceMesh | None) -> None:
    """Wait for all processes, one dimension after another; pp comes last, so the ranks of a pipeline go on together."""
    for name in ("dp", "tp", "pp"):
        if mesh is not None and mesh[name].size() > 1:
            dist.barrier(mesh.get_group(name))


def pipelines_of(mesh: DeviceMesh) -> list[list[int]]:
    """The global ranks of every pipeline of the world, each in the order of its ranks."""
    by_pipeline = mesh.mesh.movedim(list(mesh.mesh_dim_names or ()).index("pp"), -1)
    return by_pipeline.reshape(-1, by_pipeline.shape[-1]).tolist()


def forget_worlds() -> None:
    """Clear PyTorch's caches of operations; call it before this process joins another world.

    Those of operations on tensors without data have an entry for each shape that was ever seen, without a bound. Those
    of sharded operations are keyed by a mesh's ranks and dimension names. A mesh of the next world may have the same
    key, and would be answered with the old mesh, whose process groups no longer exist.
    """
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None:
        fake.FakeTensorMode.cache_clear()
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    getattr(redistribute, "clear_redistribute_planner_cache", lambda: None)()
    # Others grow with every shape that is seen, and keep the groups of old meshes open.
    for function in _cached_functions(sum(name.startswith(_SHARDED) for name in sys.modules)):
        function.cache_clear()


@functools.lru_cache(maxsize=1)
def _cached_functions(modules: int) -> list[Any]:
    """The functions of PyTorch's sharded tensors that keep results. `modules`, their number, says when to look anew."""
    found = [module for name, module in sys.modules.items() if name.startswith(_SHARDED)]
    owners = [*found, *(each for module in found for each in vars(module).values() if isinstance(each, type))]
    held = [value for owner in owners for value in vars(owner).values()]
    functions = [getattr(value, "__func__", value) for value in held]
    return [function for function in functions if isinstance(function, _Cached)]
