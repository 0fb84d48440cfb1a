"""Run by torchrun: PyTorch's own pipeline runtime trains a step with a schedule file of ours; writes its gradients.

torchrun --nproc-per-node RANKS pytorch_runtime.py CONFIG.pt SCHEDULE.csv FORMAT OUT [SCHEDULE.csv FORMAT OUT ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from ppexec.config.config import RunConfig
from ppexec.models.batch import load_batch
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model
from ppsim import Schedule


def train(config: RunConfig, path: str, form: str, out: Path) -> None:
    """One step; gradients by layer and name."""
    rank, schedule = dist.get_rank(), Schedule.from_csv(Path(path).read_text())
    model = load_model(config)
    per_stage = config.layers // schedule.stages
    held = schedule.stages_of(rank)
    layers = {
        stage: [
            initialize_layer(model.layers[layer], index=layer, seed=config.seed, device=torch.device("cpu"))
            for layer in range(stage * per_stage, (stage + 1) * per_stage)
        ]
        for stage in held
    }
    stages = [
        PipelineStage(nn.Sequential(*layers[stage]), stage, schedule.stages, torch.device("cpu")) for stage in held
    ]
    runtime = _PipelineScheduleRuntime(stages, config.microbatches, loss_fn=model.loss)
    runtime._load_csv(path, format=form)
    batch = load_batch(
        model.sample,
        seed=config.seed,
        step=0,
        microbatches=config.microbatches,
        has_first=True,
        has_last=True,
        device=torch.device("cpu"),
    )
    inputs = (torch.cat(batch.inputs),) if 0 in held else ()
    target = torch.cat(batch.targets) if schedule.stages - 1 in held else None
    runtime.step(*inputs, target=target)
    gradients = {
        (stage * per_stage + position, name): parameter.grad
        for stage in held
        for position, layer in enumerate(layers[stage])
        for name, parameter in layer.named_parameters()
    }
    torch.save(gradients, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = torch.load(sys.argv[1])
    jobs = sys.argv[2:]
    for path, form, out in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        train(RunConfig(**settings), path, form, Path(out))
    dist.destroy_process_group()
