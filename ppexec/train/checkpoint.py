"""Checkpoint: parameters and optimizer state by their global names, so that any mesh can load what any other saved.

PyTorch's distributed checkpoint writes each slice once, from whichever rank holds it, and fills each rank's slices from
whatever files hold them: a stage that moved, or a tensor that is sharded otherwise, is found by name and offset. Every
step has a folder of its own, complete once its metadata is there, so a kill while saving spoils nothing older.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

_METADATA = ".metadata"


def parameter_key(layer: int, name: str) -> str:
    """The global name of a parameter: it depends on no stage, rank or mesh."""
    return f"layers.{layer}.{name}"


def state_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of these parameters: themselves and their optimizer state, sharing memory."""
    state: dict[str, Any] = {}
    for key, parameter in parameters.items():
        state[f"model.{key}"] = parameter.detach()
        for name, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = value
    return state


def save(directory: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the state before `step` under `directory`, which all processes must share; the folder. Collective."""
    import torch.distributed.checkpoint as dcp

    folder = directory / f"step-{step:08d}"
    dcp.save({**state, "step": step}, storage_writer=dcp.FileSystemWriter(folder))
    return folder


def load(directory: Path, state: dict[str, Any]) -> int:
    """Fill the state from the newest complete checkpoint under `directory`; the step that comes next. Collective.

    Raises ValueError if there is none, or if it is of another model.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(newest(directory))
    held: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    for key, value in state.items():
        there = getattr(held.get(key), "size", None)
        if there != value.shape:
            found = "nothing" if there is None else f"a tensor of shape {list(there)}"
            raise ValueError(
                f"{directory} holds {found} for {key}, where this model has shape {list(value.shape)}: "
                "resume with the model and sizes that were saved"
            )
    whole = {**state, "step": 0}
    dcp.load(whole, storage_reader=reader)
    return int(whole["step"])


def newest(directory: Path) -> Path:
    """The newest complete checkpoint in a directory, or the directory if it is one itself; ValueError if none."""
    if (directory / _METADATA).is_file():
        return directory
    complete = sorted(path.parent for path in directory.glob(f"step-*/{_METADATA}"))
    if not complete:
        raise ValueError(f"there is no complete checkpoint in {directory}: give the directory that was saved to")
    return complete[-1]
