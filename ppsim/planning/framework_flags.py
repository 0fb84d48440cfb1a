"""Framework flags: a training step as the command lines of Megatron-LM and torchtitan say it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import accumulate

from ppsim.costs.layout import Layout
from ppsim.planning.training_step import TrainingStep
from ppsim.schedule.placement import loop_placement, v_placement

# torchtitan takes PyTorch's names of schedules.
_TORCH = {
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "afab": "GPipe",
    "zb-v": "ZBVZeroBubble",
    "interleaved-zb": "InterleavedZeroBubble",
    "looped-bfs": "LoopedBFS",
    "dualpipe-v": "DualPipeV",
}
_MEGATRON = ("1f1b", "interleaved-1f1b")


def layout_of(step: TrainingStep) -> Layout:
    """The step's partition as Megatron's `--pipeline-model-parallel-layout` spells it."""
    sizes = list(step.stage_blocks)
    sizes[0] += 1
    sizes[-1] += 1
    return Layout.of_sizes(sizes)


def megatron_flags(step: TrainingStep) -> list[str] | None:
    """Flags for Megatron-LM; None for a schedule that it does not have."""
    if step.pp > 1 and step.schedule not in _MEGATRON:
        return None
    flags = [
        f"--tensor-model-parallel-size {step.tp}",
        f"--pipeline-model-parallel-size {step.pp}",
        f"--micro-batch-size {step.micro_batch_size}",
        f"--global-batch-size {step.global_batch}",
        f"--seq-length {step.seq}",
    ]
    if step.cp > 1:
        flags.append(f"--context-parallel-size {step.cp}")
    if step.model.experts is not None:
        flags.append(f"--expert-model-parallel-size {step.ep}")
        flags.append(f"--expert-tensor-parallel-size {step.execution.expert_ranks}")
    if step.pp > 1:
        flags.append(f"--pipeline-model-parallel-layout '{layout_of(step)}'")
    if step.tp > 1 and step.sequence_parallel:
        flags.append("--sequence-parallel")
    if step.sharding == "optimizer":
        flags.append("--use-distributed-optimizer")
    if step.overlap_gradients > 0:
        flags.append("--overlap-grad-reduce")
    if step.recompute == "full":
        flags.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif step.recompute == "selective":
        flags.append("--recompute-granularity selective")
    return flags


def torchtitan_flags(step: TrainingStep, csv: str) -> list[str] | None:
    """Flags for torchtitan, as it was in late 2025; None for what it cannot be told.

    Parameters
    ----------
    step : TrainingStep
        What is run.
    csv : str
        Where the schedule lies if PyTorch has it under no name.

    Notes
    -----
    torchtitan shards with FSDP. Where the optimizer's state is cut, weights stay whole between forward and backward.
    Its tensor parallelism always is sequence parallelism, its attention always fused, so that nothing selective of it
    can be computed again, and it lays stages on ranks in loops or, two on each rank, in a V.
    """
    if (step.tp > 1 and not step.sequence_parallel) or step.attention != "fused":
        return None
    is_cut = step.sharding == "optimizer"
    # Without a pipeline nothing cuts the local batch: gradients are summed over several of them.
    local_batch = step.micro_batch_size * (step.microbatches if step.pp > 1 else 1)
    flags = [
        f"--parallelism.tensor_parallel_degree {step.tp}",
        f"--parallelism.pipeline_parallel_degree {step.pp}",
        f"--parallelism.data_parallel_replicate_degree {1 if is_cut else step.dp}",
        f"--parallelism.data_parallel_shard_degree {step.dp if is_cut else 1}",
        f"--training.local_batch_size {local_batch}",
        f"--training.global_batch_size {step.global_batch}",
        f"--training.seq_len {step.seq}",
        f"--activation_checkpoint.mode {step.recompute}",
    ]
    if step.cp > 1:
        flags.append(f"--parallelism.context_parallel_degree {step.cp}")
    if step.model.experts is not None:
        flags.append(f"--parallelism.expert_parallel_degree {step.ep}")
        flags.append(f"--parallelism.expert_tensor_parallel_degree {step.execution.expert_ranks}")
    if is_cut:
        flags.append("--parallelism.fsdp_reshard_after_forward never")
    if step.pp == 1:
        return flags
    pipeline = _torchtitan_pipeline(step, csv)
    return None if pipeline is None else flags + pipeline


def _torchtitan_pipeline(step: TrainingStep, csv: str) -> list[str] | None:
    """The flags of a schedule and of the cut; torchtitan counts a rank's stages in the cut."""
    parts = _module_names(step.stage_blocks)
    if not all(parts):
        return None
    flags = [
        f"--parallelism.pipeline_parallel_microbatch_size {step.micro_batch_size}",
        "--parallelism.module_fqns_per_model_part " + " ".join(",".join(part) for part in parts),
    ]
    name = _TORCH.get(step.schedule)
    if name is not None:
        return [*flags, f"--parallelism.pipeline_parallel_schedule {name}"]
    # Beside a CSV the schedule's name only says how stages lie on ranks.
    names = {
        loop_placement(step.pp, step.stages_per_rank): "PipelineScheduleMulti",
        v_placement(step.pp, 2): "ZBVZeroBubble",
    }
    name = names.get(tuple(step.placement.tolist()))
    if name is None:
        return None
    return [
        *flags,
        f"--parallelism.pipeline_parallel_schedule {name}",
        f"--parallelism.pipeline_parallel_schedule_csv {shlex.quote(csv)}",
    ]


def _module_names(stage_blocks: Sequence[int]) -> list[list[str]]:
    """The modules of each stage, as torchtitan's language models name them."""
    ends = list(accumulate(stage_blocks))
    parts = [
        [f"layers.{number}" for number in range(end - blocks, end)]
        for blocks, end in zip(stage_blocks, ends, strict=True)
    ]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return parts
