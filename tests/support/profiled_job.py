"""Run by torchrun: steps on PyTorch's own pipeline runtime over gloo under torch.profiler; a Chrome trace of each rank.

torchrun --nproc-per-node RANKS profiled_job.py SCHEDULE.csv SLEEP_S STEPS OUT [SCHEDULE.csv ...]

Stages sleep: SLEEP_S in F and twice that in B, later stages a little longer. On cores that others use too, ranks that
computed would take now this long and now that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.profiler import ProfilerActivity, profile

from ppsim import Schedule

HIDDEN, SAMPLES = 64, 16


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradient.clone(), None


class Sleeper(nn.Module):
    """A linear layer that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(HIDDEN, HIDDEN), seconds

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(self.linear(value), self.seconds)


def train(path: str, sleep_s: float, steps: int, out: Path) -> None:
    rank = dist.get_rank()
    schedule = Schedule.from_csv(Path(path).read_text())
    held = schedule.stages_of(rank)
    layers = {stage: Sleeper(sleep_s * (1 + 0.1 * stage)) for stage in held}
    stages = [PipelineStage(layers[stage], stage, schedule.stages, torch.device("cpu")) for stage in held]
    runtime = _PipelineScheduleRuntime(stages, schedule.microbatches, loss_fn=nn.functional.mse_loss)
    runtime._load_csv(path, format="compute_only")
    data = torch.randn(schedule.microbatches * SAMPLES, HIDDEN)
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
    for path, sleep_s, steps, out in zip(*(jobs[at::4] for at in range(4)), strict=True):
        train(path, float(sleep_s), int(steps), Path(out))
    dist.destroy_process_group()
