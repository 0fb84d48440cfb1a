"""Copied: stages of which the ranks hold several copies, as a schedule in two directions has them.

All copies start alike, and each sees the microbatches that pass through it. At the end of a step each has the sum of
all copies' gradients, so that they stay equal. One process without a pipeline adds up each copy's microbatches in turn
and then the copies' sums. With two copies that is the same sum to the bit, in whichever order they are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import pipelines_of
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import local_gradient


def copy_groups(placement: Sequence[int], copies: int, mesh: DeviceMesh) -> dict[int, dist.ProcessGroup]:
    """The processes that hold copies of a stage, for each stage of this process. All processes must call it together.

    Parameters
    ----------
    placement : sequence of int, shape (stages,)
        The rank of each stage of all copies.
    copies : int
        Copies of the model.
    mesh : DeviceMesh
        Of the run.

    Returns
    -------
    dict
        Stage -> group.
    """
    found: dict[int, dist.ProcessGroup] = {}
    own = mesh.get_local_rank("pp")
    size = len(placement) // copies
    for first in range(size):
        stages = range(first, len(placement), size)
        for line in pipelines_of(mesh):
            members = [line[placement[stage]] for stage in stages]
            group = dist.new_group(members)
            if dist.get_rank() in members:
                found |= {stage: group for stage in stages if placement[stage] == own}
    return found


class CopiedGradients:
    """Adds up the gradients of copies that are all in this process.

    Parameters
    ----------
    stages : mapping
        Stage number -> stage, of all copies.
    copies : int
        Copies of the model.
    """

    def __init__(self, stages: Mapping[int, Stage], copies: int) -> None:
        size = len(stages) // copies
        self._copies_of = [[stages[index] for index in range(first, len(stages), size)] for first in range(size)]

    def add(self) -> None:
        """Replace each copy's gradients by the sum of all."""
        for each in self._copies_of:
            for parameters in zip(*(stage.parameters for stage in each), strict=True):
                gradients = [gradient for p in parameters if (gradient := local_gradient(p)) is not None]
                total = sum(gradients[1:], gradients[0])
                for gradient in gradients:
                    gradient.copy_(total)
