"""Trainings: one model trained on several meshes, each held against one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppexec.api import train
from ppexec.config.config import RunConfig
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool

_TIMES_CONTROL = 10
_ROUNDINGS = 4
_MOST = 1e-3  # of the loss


def train_on_meshes(
    one_process: RunConfig, meshes: Mapping[str, RunConfig], *, advance: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Train on every mesh, and go on from the checkpoint of another.

    Each mesh saves half-way. The next mesh loads that (the first mesh the last one's) and takes one step.

    Parameters
    ----------
    one_process : RunConfig
        The training that all others are held against, of `steps` steps.
    meshes : mapping
        Name -> the same training on a mesh.
    advance : callable
        Called 2 + 2 * len(meshes) times.

    Returns
    -------
    dict
        JSON values. one_process, control (see `allowed_distances`): losses of every step. allowed: by step. meshes: a
        row for each with its losses, `distance` from one process, and what became of the step from a checkpoint.
        equal: whether all of them are.
    """
    steps = one_process.steps
    half = steps // 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as saved, WorkerPool() as pool:
        folders = {name: Path(saved, str(number)) for number, name in enumerate(meshes)}
        expected = train(one_process, pool=pool).losses
        advance()
        with Session(one_process, pool=pool) as session:
            session.nudge()
            control = session.train(steps).losses
        advance()
        allowed = allowed_distances(expected, control, one_process.torch_dtype)
        for name, config in meshes.items():
            with Session(config, pool=pool) as session:
                losses = session.train(half).losses
                session.save_checkpoint(folders[name])
                losses += session.train(steps - half).losses
            rows.append({"mesh": name, "losses": losses, **distance(losses, expected, allowed)})
            advance()
        for number, row in enumerate(rows):
            source = rows[number - 1]
            (loss,) = train(meshes[row["mesh"]], steps=1, resume=folders[source["mesh"]], pool=pool).losses
            found = distance([loss], [source["losses"][half]], [allowed[half]])
            row["resumed"] = {"from": source["mesh"], "step": half, "loss": loss, **found}
            advance()
    return {
        "one_process": expected,
        "control": control,
        "allowed": allowed,
        "meshes": rows,
        "equal": all(row["equal"] and row["resumed"]["equal"] for row in rows),
    }


def allowed_distances(expected: Sequence[float], control: Sequence[float], dtype: torch.dtype) -> list[float]:
    """How far the loss of each step may be from one process's, relative to it.

    Parameters
    ----------
    expected : sequence of float, shape (steps,)
        Losses of one process.
    control : sequence of float, shape (steps,)
        Losses of one process whose every parameter starts one rounding away. They show what rounding alone does.
    dtype : torch.dtype
        Of the losses.

    Returns
    -------
    list of float, shape (steps,)
        Ten times the control's largest distance so far, or four roundings of the loss if that is more. It is never more
        than 0.001: a training that amplifies roundings beyond that shows nothing.
    """
    rounding = torch.finfo(dtype).eps
    farthest, bounds = 0.0, []
    for loss, strayed in zip(expected, control, strict=True):
        farthest = max(farthest, abs(strayed - loss))
        within = max(_TIMES_CONTROL * farthest, _ROUNDINGS * rounding * abs(loss))
        bounds.append(min(within, _MOST * abs(loss)))
    return bounds


def distance(losses: Sequence[float], expected: Sequence[float], allowed: Sequence[float]) -> dict[str, Any]:
    """The largest relative distance of losses from others, and whether every step's is allowed; NaN is not.

    Examples
    --------
    >>> distance([1.0, 0.75], [1.0, 0.5], [0.1, 0.3])
    {'max_relative_difference': 0.5, 'equal': True}
    """
    apart = [abs(mine - theirs) for mine, theirs in zip(losses, expected, strict=True)]
    return {
        "max_relative_difference": max(gap / abs(theirs) for gap, theirs in zip(apart, expected, strict=True)),
        "equal": all(gap <= most for gap, most in zip(apart, allowed, strict=True)),
    }
