"""Compute one action of a stage."""

from __future__ import annotations

import torch

from ppexec.models.batch import Batch
from ppexec.models.shapes import Tree
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppsim import Kind

_F, _R, _B, _I = Kind.F, Kind.R, Kind.B, Kind.I  # looked up once: every action passes here


def act(
    stage: Stage | TimedStage,
    kind: Kind,
    microbatch: int,
    value: Tree | None,
    batch: Batch,
    *,
    split: bool,
    again: bool = False,
    moves: bool = False,
) -> torch.Tensor | None:
    """Compute one action of a stage.

    Parameters
    ----------
    stage : Stage or TimedStage
        Whose action it is.
    kind : Kind
        F, R, B, I or W.
    microbatch : int
        Its number in the step.
    value : Tensor, pytree of tensors or None
        The input for F, the gradient of the output for B and I.
    batch : Batch
        Has the targets.
    split : bool
        Whether the backward of an F will be I and W.
    again : bool
        Whether R will compute an F once more.
    moves : bool
        Whether O will move what an F keeps to host memory.

    Returns
    -------
    Tensor or None
        The output of F, the gradient of the input for B and I.
    """
    if kind == _F:
        target = batch.targets[microbatch] if stage.loss is not None else None
        return stage.forward(microbatch, value, target, split=split, again=again, moves=moves)
    if kind == _R:
        stage.recompute(microbatch, split=split)
        return None
    if kind == _B:
        return stage.backward(microbatch, value)
    if kind == _I:
        return stage.backward_input(microbatch, value)
    stage.backward_weight(microbatch)
    return None
