"""Plain training: the training that a configuration describes, in one process, written with PyTorch's own parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import lr_scheduler

from ppexec import Model, RunConfig
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model
from ppexec.models.seeds import HELD_OUT, microbatch_order
from ppexec.models.ties import tie


@dataclass
class Curves:
    """By step losses, norms of all gradients before clipping, and learning rates; by evaluation held-out losses."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)


def plain_training(config: RunConfig, steps: int) -> Curves:
    """Train the whole model on the same data in the same order: one loop, one optimizer, no pipeline."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)  # as the ranks, since sums depend on it
    try:
        return _trained(config, steps)
    finally:
        torch.set_num_threads(before)


def _trained(config: RunConfig, steps: int) -> Curves:
    model = load_model(config)
    network = _network(model, config)
    parameters = list(network.parameters())
    masters = [parameter.detach().float() for parameter in parameters] if config.master_weights else parameters
    optimizer = torch.optim.AdamW(masters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = plain_schedule(config, optimizer)
    count = config.step_microbatches * config.accumulate
    curves = Curves()
    for step in range(steps):
        network.zero_grad()
        losses: dict[int, float] = {}
        for index in microbatch_order(config.seed, step=step, microbatches=count).tolist():
            if model.randomness is not None:
                model.randomness.at(step, config.samples_of(index))
            inputs, target = model.sample(index)
            loss = model.loss(network(inputs), target)
            (loss / count).backward()
            losses[index] = float(loss.detach())
        if config.master_weights:
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(masters, float("inf") if config.clip_norm is None else config.clip_norm)
        curves.losses.append(sum(losses[index] for index in sorted(losses)) / count)
        curves.gradient_norms.append(float(norm))
        curves.learning_rates.append(scheduler.get_last_lr()[0])
        if not config.skip_nonfinite or bool(torch.isfinite(norm)):
            optimizer.step()
        if config.master_weights:
            with torch.no_grad():
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.copy_(master)
        scheduler.step()
        if config.evaluate_every and (step + 1) % config.evaluate_every == 0:
            curves.held_out_losses.append(_held_out_loss(network, model, config))
    return curves


def _held_out_loss(network: nn.Sequential, model: Model, config: RunConfig) -> float:
    """The mean loss of the first held-out microbatches, by a copy of the network in evaluation mode."""
    if model.randomness is not None:
        model.randomness.off()
    network = copy.deepcopy(network).eval()
    losses = []
    with torch.no_grad():
        for number in range(config.evaluate_steps * config.step_microbatches):
            inputs, target = model.sample(HELD_OUT + number) if model.held_out is None else model.held_out(number)
            losses.append(float(model.loss(network(inputs), target)))
    return sum(losses) / len(losses)


def plain_schedule(config: RunConfig, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """PyTorch's own schedulers, one for the warm-up and one for what follows."""
    steps, least, most = config.learning_rate_decay_steps, config.min_learning_rate, config.learning_rate
    after: lr_scheduler.LRScheduler
    if config.learning_rate_decay == "none":
        after = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    elif config.learning_rate_decay == "linear":
        after = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=least / most, total_iters=steps)
    else:
        after = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=least)
    warmup = config.learning_rate_warmup
    if not warmup:
        return after
    rising = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return lr_scheduler.SequentialLR(optimizer, [rising, after], milestones=[warmup])


def _network(model: Model, config: RunConfig) -> nn.Sequential:
    """The whole chain from the run's seeds; tied places have one parameter."""
    layers = [
        initialize_layer(layer, index=index, seed=config.seed, device=torch.device("cpu"))
        for index, layer in enumerate(model.layers)
    ]
    tie(dict(enumerate(layers)), model.tied)
    return nn.Sequential(*layers)
