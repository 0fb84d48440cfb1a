"""Flags say the plan that won: read as the frameworks read them, they give back its batch, schedule and cut."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pytest
import tyro
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)

from ppsim import TrainingStep, Transformer, build_schedule
from ppsim.planning.framework_flags import torchtitan_flags
from ppsim.schedule.placement import loop_placement, v_placement
from tests.support.named import ONE_WAY

LLAMA = Transformer(
    layers=26, hidden=64, intermediate=128, heads=4, kv_heads=4, head_dim=16, vocabulary=512, gated=True, norm="rmsnorm"
)
STEP = TrainingStep(model=LLAMA, seq=64, micro_batch_size=2, microbatches=8)


@dataclass
class _Parallelism:
    """Of torchtitan's options those that the flags name, with its types and defaults."""

    tensor_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1
    data_parallel_replicate_degree: int = 1
    data_parallel_shard_degree: int = -1
    fsdp_reshard_after_forward: str = "default"
    pipeline_parallel_microbatch_size: int = 1
    module_fqns_per_model_part: list[list[str]] | None = None
    pipeline_parallel_schedule: str = "1F1B"
    pipeline_parallel_schedule_csv: str | None = ""


@dataclass
class _Training:
    local_batch_size: int = 8
    global_batch_size: int = -1
    seq_len: int = 2048


@dataclass
class _Checkpointing:
    mode: str = "selective"


@dataclass
class _Job:
    parallelism: _Parallelism = field(default_factory=_Parallelism)
    training: _Training = field(default_factory=_Training)
    activation_checkpoint: _Checkpointing = field(default_factory=_Checkpointing)


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _comma_separated(info: Any) -> Any:
    """torchtitan reads a list of names with commas, so that a list of lists has spaces between them."""
    if info.type != list[str]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAMES",
        instance_from_str=lambda words: words[0].split(","),
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=lambda value: [",".join(value)],
    )


def _read(step: TrainingStep, csv: str = "schedule.csv") -> _Job:
    flags = torchtitan_flags(step, csv)
    assert flags is not None
    return tyro.cli(_Job, args=shlex.split(" ".join(flags)), registry=_REGISTRY)


def _placement(job: _Job) -> tuple[int, ...]:
    """torchtitan's rule: in a V for the two schedules that ask for it, else in loops."""
    assert job.parallelism.module_fqns_per_model_part is not None
    ranks, stages = job.parallelism.pipeline_parallel_degree, len(job.parallelism.module_fqns_per_model_part)
    lies_in_v = get_schedule_class(job.parallelism.pipeline_parallel_schedule) in (
        ScheduleZBVZeroBubble,
        ScheduleDualPipeV,
    )
    return v_placement(ranks) if lies_in_v else loop_placement(ranks, stages // ranks)


def test_without_a_pipeline_the_local_batch_is_one_microbatch() -> None:
    """Cause of a bug: it was all microbatches at once, which only a pipeline cuts again."""
    job = _read(replace(STEP, dp=4, sharding="optimizer"))
    assert job.training.local_batch_size == 2
    assert job.training.global_batch_size == 2 * 8 * 4
    assert job.parallelism.data_parallel_shard_degree == 4
    assert job.parallelism.module_fqns_per_model_part is None


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_pipeline_comes_back(name: str) -> None:
    """Causes of bugs: the cut and stages_per_rank went unsaid, and PyTorch knows no schedule of its runtime's name."""
    chunks = build_schedule(name, ranks=4, microbatches=8).stages // 4
    job = _read(replace(STEP, pp=4, schedule=name, stages_per_rank=chunks), csv="my steps.csv")
    step = replace(STEP, pp=4, schedule=name, stages_per_rank=chunks)
    assert job.training.local_batch_size // job.parallelism.pipeline_parallel_microbatch_size == step.microbatches
    parts = job.parallelism.module_fqns_per_model_part
    assert parts is not None
    assert list(chain(*parts)) == ["tok_embeddings", *(f"layers.{number}" for number in range(26)), "norm", "output"]
    assert [sum(module.startswith("layers.") for module in part) for part in parts] == list(step.stage_blocks)
    assert _placement(job) == tuple(step.placement.tolist())
    pytorch = get_schedule_class(job.parallelism.pipeline_parallel_schedule)
    if job.parallelism.pipeline_parallel_schedule_csv:
        assert job.parallelism.pipeline_parallel_schedule_csv == "my steps.csv"
    else:
        assert pytorch is not PipelineScheduleMulti


@pytest.mark.parametrize("chunks", [3, 6])
def test_any_number_of_stages_per_rank_and_any_cut_is_said(chunks: int) -> None:
    """Cause of a bug: torchtitan takes two stages per rank and its own cut unless it is told."""
    blocks = (0, *[1] * (4 * chunks - 2), 26 - (4 * chunks - 2))
    step = replace(STEP, pp=4, schedule="interleaved-1f1b", stages_per_rank=chunks, blocks=blocks)
    parts = _read(step).parallelism.module_fqns_per_model_part
    assert parts is not None
    assert len(parts) == 4 * chunks
    assert parts[0] == ["tok_embeddings"]
    assert len(parts[-1]) == blocks[-1] + 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tp": 2, "sequence_parallel": False},
        {"attention": "unfused", "recompute": "selective"},
        {"pp": 4, "blocks": (13, 0, 0, 13)},
    ],
)
def test_what_torchtitan_cannot_be_told_is_not_said(changes: dict[str, Any]) -> None:
    assert torchtitan_flags(replace(STEP, **changes), "schedule.csv") is None
