"""Tasks: what a worker is asked to do in a training, which goes on from call to call."""

from __future__ import annotations

from pathlib import Path

from ppexec.training.train import Trainer, TrainStep
from ppexec.workers.worker import Worker


def _trainer(worker: Worker) -> Trainer:
    return worker.keep(Trainer, lambda: Trainer(worker))


def train(worker: Worker, *, steps: int) -> list[TrainStep]:
    """Go on by `steps` optimizer steps; what all ranks know of each."""
    return _trainer(worker).steps(steps)


def next_step(worker: Worker) -> int:
    """The number of the next step of the training."""
    return _trainer(worker).next_step


def save_checkpoint(worker: Worker, *, directory: Path) -> Path:
    """Write a checkpoint; its folder."""
    return _trainer(worker).save(directory)


def load_checkpoint(worker: Worker, *, directory: Path) -> int:
    """Go on from a checkpoint; the number of the next step."""
    return _trainer(worker).load(directory)


def nudge(worker: Worker) -> None:
    """Move every parameter by one rounding."""
    _trainer(worker).nudge()
