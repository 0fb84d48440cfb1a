"""Framework flags: a training step as the command lines of Megatron-LM and torchtitan say it."""

from __future__ import annotations

from ppsim.costs.layout import Layout
from ppsim.planning.training_step import TrainingStep

# torchtitan takes PyTorch's names of schedules.
_TORCH = {"1f1b": "1F1B", "interleaved-1f1b": "Interleaved1F1B", "afab": "GPipe", "zb-v": "ZBVZeroBubble"}
_TORCH |= {"interleaved-zb": "InterleavedZeroBubble", "looped-bfs": "LoopedBFS", "dualpipe-v": "DualPipeV"}
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


def torchtitan_flags(step: TrainingStep, csv: str = "schedule.csv") -> list[str]:
    """Flags for torchtitan; `csv`: where the schedule lies if PyTorch has it under no name."""
    flags = [
        f"--parallelism.tensor_parallel_degree {step.tp}",
        f"--parallelism.pipeline_parallel_degree {step.pp}",
        "--parallelism.data_parallel_replicate_degree " + ("1" if step.sharding == "optimizer" else str(step.dp)),
        "--parallelism.data_parallel_shard_degree " + (str(step.dp) if step.sharding == "optimizer" else "1"),
        f"--training.local_batch_size {step.micro_batch_size * step.microbatches}",
        f"--training.global_batch_size {step.global_batch}",
        f"--training.seq_len {step.seq}",
        f"--activation_checkpoint.mode {step.recompute}",
    ]
    if step.pp > 1:
        flags.append(f"--parallelism.pipeline_parallel_microbatch_size {step.micro_batch_size}")
        name = _TORCH.get(step.schedule)
        if name is None:
            flags.append("--parallelism.pipeline_parallel_schedule _PipelineScheduleRuntime")
            flags.append(f"--parallelism.pipeline_parallel_schedule_csv {csv}")
        else:
            flags.append(f"--parallelism.pipeline_parallel_schedule {name}")
    return flags
