"""Build: a stage with its own layers made real, initialised and sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppexec.models.initialize import initialize_layer
from ppexec.models.model import Model
from ppexec.stage.recompute import RecomputingStage
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import shard_layer
from ppexec.stage.tied import start_tied

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build_stage(
    index: int,
    model: Model,
    layers: range,
    *,
    is_last: bool,
    microbatches: int,
    trains: bool,
    recompute: bool = False,
    seed: int,
    device: torch.device,
    copies_input: bool = False,
    mesh: DeviceMesh | None = None,
) -> Stage:
    """A stage with its own layers made real and initialised; the model's other layers stay as they are.

    recompute: whether it keeps its layers' inputs alone (see `stage.recompute`). mesh: of the tp dimension, over which
    each layer is sharded as soon as it is real; None keeps layers whole.
    """
    modules = []
    for layer in layers:
        whole = initialize_layer(model.layers[layer], index=layer, seed=seed, device=device)
        start_tied(whole, model, index=layer, seed=seed, device=device)
        modules.append(shard_layer(whole, model, mesh, index=layer))
    return (RecomputingStage if recompute else Stage)(
        index,
        modules,
        first_layer=layers.start,
        loss=model.loss if is_last else None,
        microbatches=microbatches,
        trains=trains,
        copies_input=copies_input,
        randomness=model.randomness,
    )
