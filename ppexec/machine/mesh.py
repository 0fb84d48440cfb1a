"""Mesh: the processes of a run, met as one world and laid out as one DeviceMesh with the dimensions dp, pp and tp."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD_BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl", "local": "gloo"}
"""What a world is made with, by a run's backend: objects and barriers go over gloo, tensors of GPUs over NCCL."""


def join_world(*, rank: int, world_size: int, store: dist.Store, backend: str, timeout_s: float) -> None:
    """Make this process one of `world_size`, leaving the world it was in before."""
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_worlds()
    dist.init_process_group(
        WORLD_BACKENDS[backend], store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def build_mesh(*, dp: int, pp: int, tp: int, device_type: str = "cpu") -> DeviceMesh:
    """A mesh over all processes; raises ValueError if their number is not dp * pp * tp.

    tp is innermost: its ranks exchange the most, so they are neighbours, on one machine where it has that many.
    """
    world = dist.get_world_size()
    if dp * pp * tp != world:
        raise ValueError(
            f"dp {dp} x ranks {pp} x tp {tp} needs {dp * pp * tp} processes, there are {world}: start that many"
        )
    return init_device_mesh(device_type, (dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))


def meet(mesh: DeviceMesh | None) -> None:
    """Wait until all processes have come here, one dimension after another; the ranks of a pipeline leave together."""
    for name in ("dp", "tp", "pp"):
        if mesh is not None and mesh[name].size() > 1:
            dist.barrier(mesh.get_group(name))


def pipelines_of(mesh: DeviceMesh) -> list[list[int]]:
    """The global ranks of every pipeline of the world, each from its first rank to its last."""
    by_pipeline = mesh.mesh.movedim(list(mesh.mesh_dim_names or ()).index("pp"), -1)
    return by_pipeline.reshape(-1, by_pipeline.shape[-1]).tolist()


def forget_worlds() -> None:
    """Make PyTorch forget the meshes of worlds that are no more; to be called when this process joins another.

    What it keeps of a sharded operation is found by the mesh's ranks and names, which another world's may equal, and
    holds the old mesh, whose groups are gone, or have become other groups.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    getattr(redistribute, "clear_redistribute_planner_cache", lambda: None)()
