"""Groups: the fields of a run's configuration, by what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppsim.essential import Essential
from ppsim.schedule.schedule import Communication
from ppsim.schedule.streams import Streams


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and its sizes."""

    model: Essential[str] = "mlp"
    """Built-in model ("mlp", "gpt") or your own, package.module:factory, which is imported and run; no other flag and
    no file names code."""
    preset: Literal["small", "assignment"] = "small"
    """Sizes not given otherwise: small (hidden 512, seq 64, micro batch 2), assignment (4096, 8192, 2)."""
    layers: Essential[int] = 8
    """Number of layers, cut into the stages; of a GPT its blocks (the embedding and the head come with the ends)."""
    hidden: Essential[int] = 0
    """Hidden size; 0 takes the preset's."""
    intermediate: int = 0
    """Size between fc1 and fc2; 0 takes 4 x hidden."""
    seq: Essential[int] = 0
    """Sequence length; 0 takes the preset's."""
    heads: int = 0
    """Attention heads of a GPT; 0 takes heads of 64, or in a small model 4 smaller ones."""
    vocabulary: int = 0
    """Rows of a GPT's embedding and head; 0 takes 256, one for each byte. More rows are never read, but take the time
    and memory of a larger vocabulary."""
    text: Path | None = None
    """Text whose bytes a GPT learns; this toolkit's own sources unless given."""
    dropout: float = 0.0
    """Probability with which a GPT drops elements of the embedding and of the residual branches."""
    tied: bool = False
    """Let a GPT's embedding and head share one weight."""
    recompute: bool = False
    """Keep only each layer's input, and compute the layer again for its backward (costs in a file stay as they are)."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of parameters and activations."""
    seed: int = 0
    """The number from which every random stream is derived."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many samples a step has."""

    micro_batch_size: Essential[int] = 0
    """Samples of a microbatch, the largest if they differ; 0 takes the global batch's where microbatches are given too,
    else the preset's."""
    microbatches: Essential[int] = 0
    """m, the number of microbatches of a step (with accumulate: of a round) per data-parallel replica; 0 takes the
    global batch's, else the file's, else 8."""
    replica_microbatches: str = ""
    """Microbatches of each data-parallel replica where they differ, such as 5,4, instead of microbatches; the schedule,
    by name, is built for each. Empty: all replicas have as many."""
    global_batch_size: int = 0
    """Samples of a step (with accumulate: of a round) over all replicas; 0 takes microbatches x micro batch size x dp.
    What does not divide by the microbatches given makes the first ones larger by one."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which schedule, by name or from a file, and which layers its stages have."""

    schedule: Essential[str] = "afab"
    """Built-in schedule, by name; `ppsim schedule --help` lists them."""
    from_csv: Essential[Path | None] = None
    """Schedule in PyTorch's CSV format, a row per rank and a cell per action such as 2F0; instead of --schedule."""
    copies: int | None = None
    """Copies of the model that the file's stages are of, where microbatches go in both directions; 1 unless given."""
    ranks: Essential[int] = 0
    """p, the number of pipeline ranks; 0 takes the file's, else 2."""
    stages_per_rank: Essential[int | None] = None
    """v, the number of stages on each rank; the schedule's natural number unless given."""
    microbatch_group: int | None = None
    """Microbatches of a round of an interleaved schedule; the ranks, or a few more, unless given."""
    partition: str = "even"
    """Layers to stages: even, optimal (needs --costs), or sizes such as 3,2,3. For a GPT even and sizes count blocks;
    optimal cuts the whole chain, and a first or last stage of 0 blocks has the embedding or the head alone."""
    layout: str | None = None
    """Layers to stages as Megatron's --pipeline-model-parallel-layout has it, instead of partition: a letter for each
    layer, a GPT's embedding (E) and head (L) among them, as in 'Et*3|(tt|)*2t|L'."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What else is spread over processes."""

    dp: Essential[int] = 1
    """Data-parallel replicas."""
    shard: int = 0
    """Shard parameters over the replicas (PyTorch's fully_shard); each rank has so many of its stages whole at once,
    the next that it computes. 0 does not, unless a file says UNSHARD, which is sharded as it says."""
    tp: Essential[int] = 1
    """Tensor-parallel ranks, over which each layer's weights are sharded as the model plans."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """How often a step runs, and what it does."""

    steps: Essential[int] = 10
    """Measured steps."""
    warmup: int = 2
    """Steps before the measured ones."""
    forward_only: bool = False
    """Evaluation: forwards only, no gradients."""
    compute: Essential[Literal["real", "timed"]] = "real"
    """real: ranks compute. timed: ranks wait for as long as the costs say, and send real messages."""
    costs: Essential[Path | None] = None
    """File of layer costs, JSON or CSV."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a training goes; of `ppexec train`."""

    learning_rate: float = 1e-3
    """AdamW's step size in a training, at its highest."""
    learning_rate_warmup: int = 0
    """First steps of a training, in which the learning rate rises by equal parts."""
    learning_rate_decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls after the warm-up."""
    learning_rate_decay_steps: int = 0
    """Steps over which it falls; needed with a decay."""
    min_learning_rate: float = 0.0
    """What it falls to, and stays at."""
    weight_decay: float = 0.01
    """AdamW's decay in a training."""
    master_weights: bool = False
    """In a training in bfloat16, update copies of the weights in float32, and compute with these copies rounded."""
    shard_optimizer: bool = False
    """In a training, each replica updates a part of the weights, and keeps the optimizer's state of that (ZeRO-1)."""
    accumulate: int = 1
    """Rounds of the schedule in an optimizer step of a training; each reads a global batch, and gradients add up."""
    clip_norm: float | None = None
    """Largest 2-norm of all gradients together in a training; larger ones are scaled down. Unset clips nothing."""
    skip_nonfinite: bool = False
    """Leave out an optimizer step whose loss or gradient is not finite, and go on. Without it the training ends."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations of held-out data in a training; 0 evaluates nothing."""
    evaluate_steps: int = 1
    """Global batches of an evaluation, always the same."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where ranks compute, and how messages travel."""

    backend: Essential[Literal["gloo", "nccl", "local"]] = "gloo"
    """What carries messages. gloo, nccl: between processes, one for each rank. local: copies within one process that
    has all ranks, each on a stream of its own."""
    device: Literal["auto", "cpu", "cuda", "threads"] = "auto"
    """Where ranks compute. auto: on GPUs with nccl, or with local where there is a GPU; else on the CPU. threads: on
    the CPU, but asynchronously as on a GPU, where each stream is a thread."""
    devices: Literal["own", "shared"] = "own"
    """GPUs of a run with nccl. own: one for each rank. shared: fewer, which is enough to verify and to count memory,
    but not to measure times."""
    graphs: bool = False
    """Record each action in the first step and replay it in later ones (CUDA graphs), which takes the host one launch.
    Shapes and what layers do in Python must be the same in every step. On a CPU a replay is no faster."""
    threads: int = 0
    """Threads of each rank; 0 divides this machine's cores among its ranks."""
    receive_window: int = 0
    """Receives posted ahead on each link; 0 takes the smallest number that suffices plus 2, or what fits in 16 MiB if
    that is more."""
    streams: Streams = "link"
    """Who has a communicator, which runs what is posted on it one after another: each link, each pair of ranks, or each
    rank. With pair and rank (on gloo, device threads) receives are posted where they stand in the schedule."""
    communication: Communication = "as-given"
    """Where receives are posted: as the file has them; early, when the message is sent, which hangs on no streams;
    late, at their use; or derived, as where a file has none."""
    timeout_s: float = 30.0
    """Seconds without progress of any rank after which a run ends, and says where each rank stands. A GPU that takes
    longer than this for what it was given ends it too."""
