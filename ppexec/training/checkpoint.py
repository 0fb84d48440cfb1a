"""Checkpoint: parameters and optimizer state by their global names, so that any mesh can load what another has saved.

PyTorch's distributed checkpoint writes each slice once and finds slices by name and offset, so stages may move and
tensors may be sharded in another way. Each step has a folder of its own. It is complete once its metadata is written,
so a kill while saving leaves older checkpoints intact. Files are read as data (see `stored`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ppexec.training.stored import METADATA, Reader
from ppsim.errors import InputError, RunError

_Error = TypeVar("_Error", bound=Exception)
_MASTER = "master."


def parameter_key(layer: int, name: str) -> str:
    """The global name of a parameter, which does not depend on stage, rank or mesh."""
    return f"layers.{layer}.{name}"


def state_of(
    parameters: Mapping[str, nn.Parameter], updated: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What is saved, by name in the checkpoint. It shares memory with what is given.

    Parameters
    ----------
    parameters : mapping
        By `parameter_key`.
    updated : mapping
        By the same keys what the optimizer updates: the parameters, or copies of them in float32. Those that another
        replica updates are left out.
    optimizer : Optimizer
        Has the state of each.
    """
    state: dict[str, Any] = {}
    for key, parameter in parameters.items():
        state[f"model.{key}"] = parameter.detach()
        if key not in updated:
            continue
        if updated[key] is not parameter:
            state[f"{_MASTER}{key}"] = updated[key]
        for name, value in optimizer.state[updated[key]].items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def save(directory: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint. Collective.

    Parameters
    ----------
    directory : Path
        On a file system that all processes share.
    step : int
        The step that comes next.
    state : mapping
        From `state_of`.

    Returns
    -------
    Path
        The folder of this step.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    folder = directory / f"step-{step:08d}"
    try:
        dcp.save({**state, "step": step}, storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:  # of all processes, each with what it met
        failed = _inner(error, OSError)
        raise RunError(f"step {step} could not be saved to {folder}: {failed.strerror or failed}") from None
    return folder


def load(directory: Path, state: dict[str, Any], *, master_weights: bool) -> int:
    """Fill a state from the newest complete checkpoint. Collective.

    Parameters
    ----------
    directory : Path
        Has checkpoints, or is one.
    state : dict
        From `state_of`; its tensors are overwritten.
    master_weights : bool
        Whether the training has them.

    Returns
    -------
    int
        The step that comes next.

    Raises
    ------
    InputError
        If there is no checkpoint, it is damaged, or of another model.
    """
    reader = Reader(newest(directory))
    step, held = reader.step, reader.metadata.state_dict_metadata
    if not master_weights and any(key.startswith(_MASTER) for key in held):
        raise InputError(f"{directory} was saved with master_weights: resume with them")
    for key, value in state.items():
        if key.startswith(_MASTER) and key not in held:
            raise InputError(f"{directory} was saved without master_weights: resume without them, or start anew")
        there = getattr(held.get(key), "size", None)
        if there != value.shape:
            found = "nothing" if there is None else f"a tensor of shape {list(there)}"
            raise InputError(
                f"{directory} holds {found} for {key}, where this model has shape {list(value.shape)}: "
                "resume with the model and sizes that were saved"
            )
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        raise _inner(error, InputError) from None
    return step


def _inner(error: dcp.CheckpointException, kind: type[_Error]) -> _Error:
    """What one of the processes met, if it is of that kind; else the error is raised as it is."""
    for inner, _ in error.failures.values():
        if isinstance(inner, kind):
            return inner
    raise error


def newest(directory: Path) -> Path:
    """The newest complete checkpoint in a directory, or the directory if it is one. Raises InputError without any."""
    if (directory / METADATA).is_file():
        return directory
    complete = sorted(path.parent for path in directory.glob(f"step-*/{METADATA}"))
    if not complete:
        raise InputError(f"there is no complete checkpoint in {directory}: give the directory that was saved to")
    return complete[-1]
