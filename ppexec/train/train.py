"""Train: optimizer steps on any mesh, each rank its own stages, shards and states."""

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
    """One rank's part of a training: AdamW (Loshchilov and Hutter, 2019) on the parameters that it holds.

    Decay and moments are elementwise, so a shard's update is the shard of the whole update, and replicas that start
    alike and add up their gradients stay alike. A parameter that no gradient reached has gradient zero, on every mesh.
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
        config = worker.config
        # One by one (not foreach): that takes plain and sharded parameters alike.
        self._optimizer = worker.keep(
            OPTIMIZER,
            lambda: torch.optim.AdamW(
                [{"params": list(self._parameters.values())}],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                foreach=False,
            ),
        )
        for parameter in self._parameters.values():
            # What AdamW would make in its first step; here so that there is something to load into.
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def steps(self, count: int) -> list[dict[int, float]]:
        """Go on by `count` steps; of each the losses that this rank saw, by global microbatch."""
        return [self._step() for _ in range(count)]

    def _step(self) -> dict[int, float]:
        worker, config = self._worker, self._worker.config
        batch = worker.load(self.next_step)
        worker.clear()
        worker.step(batch, is_timed=False)
        for parameter in self._parameters.values():
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
        """Go on from a checkpoint; the next step. Collective."""
        self.next_step = checkpoint.load(directory, checkpoint.state_of(self._parameters, self._optimizer))
        return self.next_step

    def nudge(self) -> None:
        """Move every parameter by one rounding, up or down by (seed, name): how far a training then strays is how far
        rounding alone leads it."""
        for key, parameter in self._parameters.items():
            whole = torch.ones(parameter.shape, dtype=parameter.dtype)
            local(parameter).detach().mul_(slice_like(parameter, nudged(whole, self._worker.config.seed, key)))


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """Loss of each step, the mean over the global batch, before that step's update.

    steps: their numbers. losses: of each. checkpoint: where the state after the last was saved, if it was.
    """

    steps: list[int]
    losses: list[float]
    checkpoint: str | None
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def mean_losses(config: RunConfig, by_process: Sequence[Sequence[Mapping[int, float]]]) -> list[float]:
    """Each step's loss from what every process saw: the mean over the global batch, added up by global index, so that
    it depends on no mesh."""
    losses = []
    for step in zip(*by_process, strict=True):
        every = {index: loss for seen in step for index, loss in seen.items()}
        if len(every) != config.microbatches * config.dp:
            raise ValueError(f"{len(every)} losses of {config.microbatches * config.dp}: the step is not complete")
        losses.append(sum(every[index] for index in sorted(every)) / len(every))
    return losses
