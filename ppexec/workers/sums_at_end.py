"""Which gradients are added up at the end of a step, when all have been computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from ppexec.models.model import Model
from ppexec.models.ties import tied_over_stages
from ppexec.stage.copied import CopiedGradients
from ppexec.stage.stage import Stage
from ppexec.stage.tied import TiedGradients
from ppexec.workers.runtime import GradientSums
from ppsim import Schedule


def sums_at_end(
    model: Model, pipeline: Schedule, stage_of_layers: Sequence[int], stages: Sequence[Stage], mesh: DeviceMesh | None
) -> list[GradientSums]:
    """Sums over copies of the model, if this process holds all, and then those of each copy's tied weights.

    Parameters
    ----------
    model : Model
        What is trained.
    pipeline : Schedule
        Its stages and their copies.
    stage_of_layers : sequence of int, shape (layers,)
        Stage of each layer.
    stages : sequence of Stage
        Those of this process.
    mesh : DeviceMesh or None
        All processes; None in a run of one process. Collective over it.
    """
    found: list[GradientSums] = []
    if pipeline.copies > 1 and mesh is None:
        found.append(CopiedGradients({stage.index: stage for stage in stages}, pipeline.copies))
    if not tied_over_stages(model.tied, stage_of_layers):
        return found
    for first in range(0, pipeline.stages, pipeline.model_stages):
        end = first + pipeline.model_stages
        held = [stage for stage in stages if first <= stage.index < end]
        found.append(
            TiedGradients(
                model.tied,
                stage_of=stage_of_layers,
                placement=pipeline.placement[first:end],
                modules={stage.first_layer + at: layer for stage in held for at, layer in enumerate(stage.layers)},
                mesh=mesh,
            )
        )
    return found
