"""Plain training: the training that a configuration describes, in one process, written with PyTorch's own parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ppexec import Model, RunConfig
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model
from ppexec.models.seeds import microbatch_order, samples_of
from ppexec.models.ties import tie


@dataclass
class Curves:
    """By step: losses, and norms of all gradients before clipping."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)


def plain_training(config: RunConfig, steps: int) -> Curves:
    """Train the whole model on the same data in the same order: one loop, one optimizer, no pipeline."""
    model = load_model(config)
    network = _network(model, config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    count = config.microbatches * config.dp * config.accumulate
    curves = Curves()
    for step in range(steps):
        optimizer.zero_grad()
        losses: dict[int, float] = {}
        for index in microbatch_order(config.seed, step=step, microbatches=count).tolist():
            if model.randomness is not None:
                model.randomness.at(step, samples_of(index, config.micro_batch_size))
            inputs, target = model.sample(index)
            loss = model.loss(network(inputs), target)
            (loss / count).backward()
            losses[index] = float(loss.detach())
        norm = nn.utils.clip_grad_norm_(
            network.parameters(), float("inf") if config.clip_norm is None else config.clip_norm
        )
        curves.losses.append(sum(losses[index] for index in sorted(losses)) / count)
        curves.gradient_norms.append(float(norm))
        if not config.skip_nonfinite or bool(torch.isfinite(norm)):
            optimizer.step()
    return curves


def _network(model: Model, config: RunConfig) -> nn.Sequential:
    """The whole chain from the run's seeds; tied places have one parameter."""
    layers = [
        initialize_layer(layer, index=index, seed=config.seed, device=torch.device("cpu"))
        for index, layer in enumerate(model.layers)
    ]
    tie(dict(enumerate(layers)), model.tied)
    return nn.Sequential(*layers)
