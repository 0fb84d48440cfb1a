"""Train: optimizer steps on any mesh, where each rank updates the parameters that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppexec.config.config import RunConfig
from ppexec.stage.tensor_parallel import local, local_gradient, slice_like
from ppexec.training import checkpoint
from ppexec.training.evaluation import Evaluation
from ppexec.training.gradients import StepLosses, clip, gather
from ppexec.training.learning_rate import learning_rate
from ppexec.training.sharded_optimizer import hand_out, owners
from ppexec.verification.rounding import nudged
from ppexec.workers.worker import OPTIMIZER, Worker
from ppsim.errors import RunError


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What all ranks know of an optimizer step.

    Parameters
    ----------
    step : int
        Its number.
    loss : float
        Before the update, of the step's microbatches of all rounds and replicas, as the model's `reduction` says.
    gradient_norm : float
        The 2-norm of all gradients, before clipping.
    learning_rate : float
        Of its update.
    held_out_loss : float or None
        After the update, if an evaluation is due.
    fault : str or None
        What is not finite. Such a step updates nothing.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    held_out_loss: float | None
    fault: str | None


class Trainer:
    """A worker's part of a training: AdamW (Loshchilov and Hutter, 2019) on the parameters that it holds, or owns.

    Where the optimizer is sharded, each replica owns some of them, and gets the others from their owners after an
    update. Where the parameters themselves are, it updates its share of each. With master weights it updates copies in
    float32 (Micikevicius et al., 2018, "Mixed Precision Training"), and parameters are these copies rounded. Gradients
    add up in the parameters' type, and are clipped in float32.

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
            (stage.first_layer + position, name): parameter
            for stage in worker.real_stages
            for position, layer in enumerate(stage.layers)
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        config = worker.config
        self._each = list({id(parameter): parameter for parameter in self._parameters.values()}.values())
        self._owner = owners(self._each, config.dp) if config.shard_optimizer else [worker.dp_rank] * len(self._each)
        own = [parameter for parameter, owner in zip(self._each, self._owner, strict=True) if owner == worker.dp_rank]
        masters = [parameter.detach().float() if self._has_master(parameter) else parameter for parameter in own]
        self._updated = dict(zip(own, masters, strict=True))
        # Not foreach, which does not take plain and sharded parameters together.
        self._optimizer = worker.keep(
            OPTIMIZER,
            lambda: torch.optim.AdamW(
                [{"params": masters}],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                foreach=False,
            ),
        )
        for parameter in masters:
            # As AdamW makes it in its first step; made here so that a checkpoint can be loaded into it.
            self._optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._evaluation = Evaluation(worker) if config.evaluate_every else None

    def _has_master(self, parameter: nn.Parameter) -> bool:
        """Whether a copy in float32 is updated in the parameter's place."""
        return self._worker.config.master_weights and parameter.dtype.itemsize < torch.float32.itemsize

    def _masters(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter that has a copy in float32, and the copy."""
        return [(parameter, master) for parameter, master in self._updated.items() if master is not parameter]

    def _tells_of(self, parameter: nn.Parameter) -> bool:
        """Whether this replica tells others of the parameter's gradient: its owner does, or the first of all.

        Each tells of sharded ones, since all must gather them.
        """
        config = self._worker.config
        is_shared = config.shard_optimizer or config.is_sharded
        return parameter in self._updated and (is_shared or self._worker.dp_rank == 0)

    def steps(self, count: int) -> list[TrainStep]:
        """Go on by `count` steps, or fewer if one has a fault and is not to be skipped."""
        done: list[TrainStep] = []
        for _ in range(count):
            done.append(self._step())
            if done[-1].fault is not None and not self._worker.config.skip_nonfinite:
                break
            self.next_step += 1
        return done

    def _step(self) -> TrainStep:
        worker, config = self._worker, self._worker.config
        rate = learning_rate(config, self.next_step)
        worker.clear()
        losses = StepLosses.none(worker, config.accumulate)
        for batch in worker.load_rounds(self.next_step, config.accumulate):
            worker.step(batch, is_timed=False)
            losses.note(worker, batch, worker.real_stages)
        for parameter in self._each:
            if local_gradient(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
        for parameter, master in self._masters():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        told = {place: self._updated[p] for place, p in self._parameters.items() if self._tells_of(p)}
        found = gather(worker, told, losses)
        first_index = self.next_step * len(found.losses.values)
        fault = found.fault(first_index=first_index, stage_of=config.stage_of_layers)
        if fault is None:
            if config.clip_norm is not None:
                clip(self._updated.values(), found.norm, config.clip_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        for parameter, master in self._masters():
            local(parameter).detach().copy_(local(master))
            master.grad = None
        if config.shard_optimizer and worker.mesh is not None:
            hand_out(self._each, self._owner, worker.mesh.get_group("dp"))
        is_due = (self.next_step + 1) % max(config.evaluate_every, 1) == 0 and (fault is None or config.skip_nonfinite)
        return TrainStep(
            step=self.next_step,
            loss=found.loss,
            gradient_norm=float(found.norm),
            learning_rate=rate,
            held_out_loss=self._evaluation.loss() if self._evaluation is not None and is_due else None,
            fault=fault,
        )

    def save(self, directory: Path) -> Path:
        """Write a checkpoint; its folder. Collective."""
        return checkpoint.save(directory, self.next_step, self._state())

    def load(self, directory: Path) -> int:
        """Go on from a checkpoint; the number of the next step. Collective."""
        master_weights = self._worker.config.master_weights
        self.next_step = checkpoint.load(directory, self._state(), master_weights=master_weights)
        return self.next_step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, in the memory of this training."""
        named = {checkpoint.parameter_key(*place): parameter for place, parameter in self._parameters.items()}
        updated = {key: self._updated[parameter] for key, parameter in named.items() if parameter in self._updated}
        return checkpoint.state_of(named, updated, self._optimizer)

    def nudge(self) -> None:
        """Move every parameter by one rounding, up or down by (seed, name).

        The difference that this makes to a training is the difference that rounding alone can make.
        """
        first_of = {place: places[0] for places in self._worker.model.tied for place in places}
        keys = {
            id(parameter): checkpoint.parameter_key(*first_of.get(place, place))
            for place, parameter in self._parameters.items()
        }
        for parameter in self._each:
            whole = torch.ones(parameter.shape, dtype=parameter.dtype)
            moved = nudged(whole, self._worker.config.seed, keys[id(parameter)])
            local(parameter).detach().mul_(slice_like(parameter, moved))
        for parameter, master in self._masters():
            local(master).copy_(local(parameter).detach())


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The curves of a training.

    Parameters
    ----------
    steps : list of int
        Numbers of the steps.
    losses : list of float
        By step, before its update, of its microbatches of all rounds and replicas.
    gradient_norms : list of float
        By step, the 2-norm of all gradients before clipping.
    learning_rates : list of float
        By step.
    evaluated : list of int
        Numbers of the steps after which held-out data was evaluated.
    held_out_losses : list of float
        By evaluation, as of one step.
    skipped : list of int
        Numbers of the steps that updated nothing, since a loss or a gradient was not finite.
    checkpoint : str or None
        Folder of the checkpoint after the last step.
    config : dict
        The run's.
    """

    steps: list[int]
    losses: list[float]
    gradient_norms: list[float]
    learning_rates: list[float]
    evaluated: list[int]
    held_out_losses: list[float]
    skipped: list[int]
    checkpoint: str | None
    config: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig, steps: Sequence[TrainStep]) -> TrainReport:
        """The report of these steps. Raises RunError if the last has a fault that the run does not skip."""
        if steps and steps[-1].fault is not None and not config.skip_nonfinite:
            raise RunError(
                f"step {steps[-1].step}: {steps[-1].fault}; nothing was updated. Look at the data and the learning "
                "rate, clip gradients (--clip-norm), or leave such steps out (--skip-nonfinite)"
            )
        return cls(
            steps=[each.step for each in steps],
            losses=[each.loss for each in steps],
            gradient_norms=[each.gradient_norm for each in steps],
            learning_rates=[each.learning_rate for each in steps],
            evaluated=[each.step for each in steps if each.held_out_loss is not None],
            held_out_losses=[each.held_out_loss for each in steps if each.held_out_loss is not None],
            skipped=[each.step for each in steps if each.fault is not None],
            checkpoint=None,
            config=config.plain().to_dict(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; None for what is not finite, which JSON does not have."""
        return {
            name: [_finite(each) for each in value] if isinstance(value, list) else value
            for name, value in asdict(self).items()
        }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
