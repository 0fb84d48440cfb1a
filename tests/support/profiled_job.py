"""Run by torchrun: steps on PyTorch's own pipeline runtime over gloo under torch.profiler; a Chrome trace of each rank.

torchrun --nproc-per-node RANKS profiled_job.py SCHEDULE.csv HIDDEN SAMPLES STEPS OUT [SCHEDULE.csv ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.profiler import ProfilerActivity, profile

from ppsim import Schedule


def train(path: str, hidden: int, samples: int, steps: int, out: Path) -> None:
    rank = dist.get_rank()
    schedule = Schedule.from_csv(Path(path).read_text())
    held = schedule.stages_of(rank)
    layers = {stage: nn.Sequential(*(nn.Linear(hidden, hidden) for _ in range(2))) for stage in held}
    stages = [PipelineStage(layers[stage], stage, schedule.stages, torch.device("cpu")) for stage in held]
    runtime = _PipelineScheduleRuntime(stages, schedule.microbatches, loss_fn=nn.functional.mse_loss)
    runtime._load_csv(path, format="compute_only")
    data = torch.randn(schedule.microbatches * samples, hidden)
    inputs = (data,) if 0 in held else ()
    target = data if schedule.stages - 1 in held else None
    runtime.step(*inputs, target=target)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(steps):
            dist.barrier()
            runtime.step(*inputs, target=target)
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / f"rank{rank}.json.gz"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    jobs = sys.argv[1:]
    for path, hidden, samples, steps, out in zip(*(jobs[at::5] for at in range(5)), strict=True):
        train(path, int(hidden), int(samples), int(steps), Path(out))
    dist.destroy_process_group()
