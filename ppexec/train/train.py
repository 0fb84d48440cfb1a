"""Train: optimizer steps on any mesh, where each rank updates the parameters that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ppexec.config.config import RunConfig
from ppexec.models.seeds import microbatch_order
from ppexec.stage.tensor_parallel import local, local_gradient, slice_like
from ppexec.train import checkpoint
from ppexec.verify.rounding import nudged
from ppexec.workers.worker import OPTIMIZER, Worker


class Trainer:
    """A worker's part of a training: AdamW (Loshchilov and Hutter, 2019) on the parameters that it holds.

    Notes
    -----
    Decay and moments are elementwise, so the update of a shard is the shard of the whole update. Replicas start equal
    and add up their gradients, so they stay equal. A parameter that no gradient reached has a gradient of zero on every
    mesh.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.next_step = 0
        self._parameters = {
            checkpoint.parameter_key(stage.first_layer + position, name): parameter
            for stage in worker.real_stages
            for position, layer in enumerate(stage.layers)
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        self._each = list({id(parameter): parameter for parameter in self._parameters.values()}.values())
        config = worker.config
        # Not foreach, which does not take plain and sharded parameters together.
        self._optimizer = worker.keep(
            OPTIMIZER,
            lambda: torch.optim.AdamW(
                [{"params": self._each}],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                foreach=False,
            ),
        )
        for parameter in self._each:
            # As AdamW makes it in its first step; made here so that a checkpoint can be loaded into it.
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def steps(self, count: int) -> list[dict[int, float]]:
        """Go on by `count` steps; for each the losses of this worker, by global microbatch."""
        return [self._step() for _ in range(count)]

    def _step(self) -> dict[int, float]:
        worker, config = self._worker, self._worker.config
        batch = worker.load(self.next_step)
        worker.clear()
        worker.step(batch, is_timed=False)
        for parameter in self._each:
            if local_gradient(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        indices = microbatch_order(
            config.seed, step=self.next_step, microbatches=config.microbatches, dp=config.dp, dp_rank=worker.dp_rank
        )
        self.next_step += 1
        return {int(indices[b]): float(loss) for stage in worker.real_stages for b, loss in stage.losses.items()}

    def save(self, directory: Path) -> Path:
        """Write a checkpoint; its folder. Collective."""
        return checkpoint.save(directory, self.next_step, checkpoint.state_of(self._parameters, self._optimizer))

    def load(self, directory: Path) -> int:
        """Go on from a checkpoint; the number of the next step. Collective."""
        self.next_step = checkpoint.load(directory, checkpoint.state_of(self._parameters, self._optimizer))
        return self.next_step

    def nudge(self) -> None:
        """Move every parameter by one rounding, up or down by (seed, name).

        The difference that this makes to a training is the difference that rounding alone can make.
        """
        first_of = {
            checkpoint.parameter_key(*place): checkpoint.parameter_key(*places[0])
            for places in self._worker.model.tied
            for place in places
        }
        keys = {id(parameter): first_of.get(key, key) for key, parameter in self._parameters.items()}
        for parameter in self._each:
            whole = torch.ones(parameter.shape, dtype=parameter.dtype)
            moved = nudged(whole, self._worker.config.seed, keys[id(parameter)])
            local(parameter).detach().mul_(slice_like(parameter, moved))


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The losses of a training.

    Parameters
    ----------
    steps : list of int
        Numbers of the steps.
    losses : list of float
        By step, before its update: the mean over the global batch.
    checkpoint : str or None
        Folder of the checkpoint after the last step.
    config : dict
        The run's.
    """

    steps: list[int]
    losses: list[float]
    checkpoint: str | None
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def mean_losses(config: RunConfig, by_process: Sequence[Sequence[Mapping[int, float]]]) -> list[float]:
    """The loss of each step: the mean over the global batch.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    by_process : sequence
        For each process and step the losses by global microbatch.

    Returns
    -------
    list of float
        Summed up by global index, so the sum does not depend on the mesh.

    Raises
    ------
    InputError
        If a microbatch's loss is missing.
    """
    losses = []
    for step in zip(*by_process, strict=True):
        every = {index: loss for seen in step for index, loss in seen.items()}
        if len(every) != config.microbatches * config.dp:
            raise RuntimeError(f"{len(every)} losses of {config.microbatches * config.dp}: the step is not complete")
        losses.append(sum(every[index] for index in sorted(every)) / len(every))
    return losses
