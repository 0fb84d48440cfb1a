"""Mesh: the processes of a run, met as one world and laid out as one DeviceMesh with the dimensions dp, pp and tp."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ppexec.stage.tensor_parallel import forget_worlds


def join_world(*, rank: int, world_size: int, store: dist.Store, backend: str, timeout_s: float) -> None:
    """Make this process one of `world_size`, leaving the world it was in before."""
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_worlds()
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
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


def meet(mesh: DeviceMesh) -> None:
    """Wait until all processes have come here, one dimension after another; the ranks of a pipeline leave together."""
    for name in ("dp", "tp", "pp"):
        if mesh[name].size() > 1:
            dist.barrier(mesh.get_group(name))
