"""Torch job: schedules run by PyTorch's own pipeline runtime, over gloo and under its profiler.

Run by torchrun as `torch_job.py LAYERS LAYER_S STEPS SCHEDULE.csv OUT [SCHEDULE.csv OUT ...]`. It writes a Chrome trace
of each rank to OUT.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.profiler import ProfilerActivity, profile

import ppsim
from ppsim.checks import check_whole
from ppsim.errors import InputError, RunError

_HIDDEN, _SAMPLES = 64, 16


def profile_schedules(
    schedules: Mapping[str, ppsim.Schedule],
    folder: Path,
    *,
    layers: int,
    layer_s: float,
    steps: int = 5,
    timeout_s: float = 600.0,
) -> dict[str, ppsim.Run]:
    """Run schedules of one job on PyTorch's pipeline runtime, and read their profiles.

    Parameters
    ----------
    schedules : mapping from str to Schedule
        Of one number of ranks. The names are those of the folders that profiles are written to.
    folder : Path
        Where the schedules and the profiles go.
    layers : int
        Layers of the job. Each stage has an equal share of them.
    layer_s : float
        Seconds that F, I and W of a layer sleep: on cores that others use too, ranks that computed would take now this
        long and now that.
    steps : int
        Profiled steps of each.
    timeout_s : float
        How long all may take.

    Returns
    -------
    dict from str to Run

    Raises
    ------
    InputError
        If the stages do not divide the layers, ranks differ, there is no step, or `layer_s` is no time.
    RunError
        If the job fails or takes longer, with what it said last.
    """
    check_whole("steps", steps)
    if not 0 <= layer_s < timeout_s:
        raise InputError(f"layer_s must be seconds from 0 to below {timeout_s:g}, got {layer_s!r}")
    ranks = {schedule.ranks for schedule in schedules.values()}
    if len(ranks) != 1:
        raise InputError(f"schedules of one number of ranks are needed, got {sorted(ranks)}")
    words = [str(layers), str(layer_s), str(steps)]
    for name, schedule in schedules.items():
        if layers % schedule.stages:
            raise InputError(f"{layers} layers do not divide into {schedule.stages} stages: take a multiple of them")
        path = folder / f"{name}.csv"
        path.write_text(schedule.to_csv(), encoding="utf-8")
        words += [str(path), str(folder / name)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks.pop())]
    try:
        done = subprocess.run(
            [*launcher, __file__, *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"the job did not end within {timeout_s:g} s: take fewer microbatches, steps or schedules, or a shorter "
            "layer_s"
        ) from None
    if done.returncode:
        raise RunError(f"PyTorch's job ended with exit code {done.returncode}", details=done.stderr[-2000:])
    return {name: ppsim.read_run(folder / name) for name in schedules}


class _SleepingBackward(torch.autograd.Function):
    """The identity, whose backward sleeps."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return gradients[0].clone(), None


class _Sleeper(nn.Module):
    """A linear layer whose F, I and W each take their time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(_HIDDEN, _HIDDEN), seconds

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        # Between the weight and its use: the runtime's W goes through it, and its I does not.
        weight = _SleepingBackward.apply(self.linear.weight, self.seconds)
        output = nn.functional.linear(value, weight, self.linear.bias)
        time.sleep(self.seconds)  # behind an operation: what a stage does before its first one is a wait, to a profile
        found: torch.Tensor = _SleepingBackward.apply(output, self.seconds)
        return found


def _train(path: Path, out: Path, *, layers: int, layer_s: float, steps: int) -> None:
    """Profile steps of one schedule on this rank."""
    rank = dist.get_rank()
    schedule = ppsim.Schedule.from_csv(path.read_text(encoding="utf-8"))
    held, share = schedule.stages_of(rank), layers // schedule.stages
    modules = {stage: nn.Sequential(*(_Sleeper(layer_s) for _ in range(share))) for stage in held}
    stages = [PipelineStage(modules[stage], stage, schedule.stages, torch.device("cpu")) for stage in held]
    runtime = _PipelineScheduleRuntime(stages, schedule.microbatches, loss_fn=nn.functional.mse_loss)
    runtime._load_csv(str(path), format="compute_only")
    data = torch.randn(schedule.microbatches * _SAMPLES, _HIDDEN)
    inputs = (data,) if 0 in held else ()
    target = data if schedule.stages - 1 in held else None
    runtime.step(*inputs, target=target)  # the first one asks for shapes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(steps):
            dist.barrier()
            runtime.step(*inputs, target=target)
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / f"rank{rank}.json.gz"))


def main() -> None:
    """What each process of the job runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layers, layer_s, steps, *paths = sys.argv[1:]
    for path, out in list(pairwise(paths))[::2]:
        _train(Path(path), Path(out), layers=int(layers), layer_s=float(layer_s), steps=int(steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
