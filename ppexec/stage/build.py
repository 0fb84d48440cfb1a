"""Build: a stage with its layers made real, initialised and sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ppexec.models.model import Model
from ppexec.stage.draws import Draws
from ppexec.stage.recomputing_stage import RecomputingStage
from ppexec.stage.sharded import ShardedParameters
from ppexec.stage.stage import Stage
from ppexec.stage.tied import build_layers

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
    replicated: bool = False,
    mesh: DeviceMesh | None = None,
    shard_mesh: DeviceMesh | None = None,
    is_first: bool | None = None,
) -> Stage:
    """Build a stage. Its own layers are made real (`build_layers`); the model's other layers stay as they are.

    Parameters
    ----------
    index : int
        Stage number.
    model : Model
        The whole chain.
    layers : range
        The layers of this stage.
    is_last : bool
        Whether it computes the loss.
    microbatches : int
        Of the step over all replicas.
    trains : bool
        False for an evaluation, for which modules are put into evaluation mode.
    recompute : bool
        Whether it keeps only its layers' inputs (see `RecomputingStage`).
    seed : int
        The run's.
    device : torch.device
        Where its layers go.
    copies_input : bool
        Whether a layer works in place on the stage's input.
    replicated : bool
        Whether others, in replicas or as copies of the model, have the same stage.
    mesh : DeviceMesh, optional
        Of the tp dimension, over which layers are sharded.
    shard_mesh : DeviceMesh, optional
        Of the dp dimension, if parameters are sharded over it.
    is_first : bool, optional
        Whether its input is data. By default that of stage 0 is.
    """
    modules = build_layers(model, layers, seed=seed, device=device, mesh=mesh)
    return (RecomputingStage if recompute else Stage)(
        index,
        modules if trains else [module.eval() for module in modules],
        first_layer=layers.start,
        is_first=is_first,
        loss=model.loss if is_last else None,
        microbatches=microbatches,
        trains=trains,
        copies_input=copies_input,
        randomness=model.randomness,
        draws=Draws(seed),
        counts_terms=model.reduction == "sum",
        replicated=replicated,
        sharded=None if shard_mesh is None else ShardedParameters(modules, shard_mesh),
    )
