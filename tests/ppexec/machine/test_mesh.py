"""Mesh: the processes of a run with the dimensions dp, pp and tp."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from ppexec import WorkerError, WorkerPool
from ppexec.machine.mesh import build_mesh
from tests.support.remote import on_every_rank


def place(dp: int, pp: int, tp: int) -> dict[str, Any]:
    mesh = build_mesh(dp=dp, pp=pp, tp=tp)
    return {
        "names": mesh.mesh_dim_names,
        "shape": tuple(mesh.shape),
        "at": tuple(mesh.get_local_rank(name) for name in ("dp", "pp", "tp")),
        "pipeline": dist.get_process_group_ranks(mesh.get_group("pp")),
    }


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_ranks_are_numbered_with_tp_innermost_and_dp_outermost(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    for rank, found in enumerate(on_every_rank(pool, dp * pp * tp, place, dp=dp, pp=pp, tp=tp)):
        at = (rank // (pp * tp), rank // tp % pp, rank % tp)
        assert found["names"] == ("dp", "pp", "tp")
        assert found["shape"] == (dp, pp, tp)
        assert found["at"] == at
        assert found["pipeline"] == [at[0] * pp * tp + stage * tp + at[2] for stage in range(pp)]


def test_another_number_of_processes_is_refused_with_both_numbers(pool: WorkerPool) -> None:
    with pytest.raises((ValueError, WorkerError), match="dp 2 x ranks 2 x tp 1 needs 4 processes, there are 3"):
        on_every_rank(pool, 3, place, dp=2, pp=2, tp=1)
