"""What does not go together in a run: each refusal names the value and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppexec.config.shared_waits import wait_alike
from ppsim import Kind
from ppsim.errors import InputError
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.simulation.gradient_reductions import stages_by_completion

if TYPE_CHECKING:
    from ppexec.config.config import RunConfig


def check_training(config: RunConfig) -> None:
    """Refuse what no optimizer can do, and options of it that have no meaning."""
    for name in ("learning_rate", "min_learning_rate", "weight_decay"):
        if not 0 <= getattr(config, name) < 1e6:
            raise InputError(f"{name} must be a number of 0 or more, got {getattr(config, name)}")
    if config.clip_norm is not None and not 0 < config.clip_norm < 1e30:
        raise InputError(f"clip_norm must be a number above 0, got {config.clip_norm}: leave it out to clip nothing")
    if config.master_weights and config.dtype != "bfloat16":
        raise InputError(
            f"master_weights has no meaning with dtype {config.dtype!r}, whose weights are updated as they are: take "
            "--dtype bfloat16, or leave it out"
        )
    if config.shard_optimizer and config.dp == 1:
        raise InputError("shard_optimizer is over data-parallel replicas: take dp 2 or more, or leave it out")
    if config.learning_rate_decay == "none":
        for name in ("learning_rate_decay_steps", "min_learning_rate"):
            if getattr(config, name):
                raise InputError(
                    f"{name}={getattr(config, name)} has no meaning without a decay: take learning_rate_decay "
                    "linear or cosine"
                )
    elif not config.learning_rate_decay_steps:
        raise InputError(
            f"learning_rate_decay {config.learning_rate_decay!r} needs learning_rate_decay_steps: give the number of "
            "steps after the warm-up over which the rate falls"
        )
    if config.min_learning_rate > config.learning_rate:
        raise InputError(
            f"min_learning_rate {config.min_learning_rate} is above learning_rate {config.learning_rate}: take at most "
            "that"
        )


def check_schedule(config: RunConfig) -> None:
    """Refuse what does not go with the schedule of a run: its copies, its replicas, and what it says beside F and B."""
    _check_copies(config)
    _check_replicas(config)
    _check_sharding(config)
    _check_recompute(config)
    _check_posts(config)
    _check_window(config)


def check_graphs(config: RunConfig) -> None:
    """Refuse what a recording of actions cannot do."""
    if not config.graphs:
        return
    for name, plain, why in (
        ("tp", 1, "its sums over ranks are not recorded"),
        ("accumulate", 1, "a recorded step makes its gradients anew"),
        ("dropout", 0.0, "a recorded action would drop the same elements in every step"),
        ("compute", "real", "there is nothing to record"),
    ):
        if getattr(config, name) != plain:
            raise InputError(f"graphs do not go with {name}={getattr(config, name)}: {why}; leave one of the two out")


def _check_copies(config: RunConfig) -> None:
    """Refuse what does not go with several copies of the model."""
    pipeline = config.pipeline
    if pipeline.copies == 1:
        return
    if pipeline.copies > 2:
        raise InputError(f"{pipeline.name} has {pipeline.copies} copies of the model: a run takes at most 2")
    for name in ("dp", "tp"):
        if getattr(config, name) > 1:
            raise InputError(
                f"{name} {getattr(config, name)} does not go with {pipeline.name}, which holds {pipeline.copies} "
                f"copies of the model: take {name} 1, or a schedule in one direction"
            )
    for stage in range(pipeline.model_stages):
        rank, other = pipeline.placement[stage], pipeline.placement[stage + pipeline.model_stages]
        if rank == other:
            raise InputError(
                f"rank {rank} holds both copies of stage {stage}, whose parameters would be one: place them on two "
                "ranks"
            )


def _check_replicas(config: RunConfig) -> None:
    """Refuse replicas that could not add up their gradients or gather their parameters together."""
    if len(set(config.microbatches_by_replica)) == 1:
        return
    if config.is_sharded and not wait_alike(config.pipelines):
        whole = config.pipeline.stages // config.pipeline.ranks
        raise InputError(
            f"with shard {config.shard} replicas of {config.replica_microbatches} microbatches would not gather "
            f"parameters in one sequence: take shard {whole}, with which a rank gathers each of its stages once, "
            "or give all replicas as many microbatches"
        )
    first = stages_by_completion(config.pipeline.program)
    for count, pipeline in {each.microbatches: each for each in config.pipelines}.items():
        if stages_by_completion(pipeline.program) != first:
            raise InputError(
                f"{pipeline.name} completes the stages of a rank in another order with {count} microbatches than "
                f"with {config.microbatches}, and replicas add up gradients in one order: give all replicas as many "
                "microbatches"
            )


def _check_sharding(config: RunConfig) -> None:
    """Refuse what does not go with sharded parameters."""
    if config.shard and config.dp == 1:
        raise InputError(f"shard {config.shard} is over data-parallel replicas: take dp 2 or more, or leave it out")
    if config.shard and config.compute == "timed":
        raise InputError(
            f"shard {config.shard} is of parameters, and compute 'timed' has none: take compute 'real', or leave "
            "shard out"
        )
    if not config.is_sharded:
        return
    for name, plain in (
        ("tp", 1),
        ("backend", "gloo"),
        ("device", "cpu"),
        ("graphs", False),
        ("shard_optimizer", False),
    ):
        if getattr(config, name) != plain:
            raise InputError(
                f"{name} {getattr(config, name)} does not go with sharded parameters: take {name} {plain}, or leave "
                f"{f'shard {config.shard}' if config.shard else 'UNSHARD'} out"
            )
    missing = [] if config.forward_only else config.pipeline.program.collectives.unreduced(config.pipeline.stages)
    if missing:
        raise InputError(
            f"the schedule gathers parameters, and {missing[0]}REDUCE_GRAD is missing: add it after the stage's "
            "last backward, or take shard 1"
        )


def _check_recompute(config: RunConfig) -> None:
    """Refuse what does not go with a schedule that says what is recomputed, or goes to host memory."""
    again = [str(action) for order in config.pipeline.orders for action in order.take(order.kind == Kind.R)[:1]]
    if config.pipeline.offload is not None:
        for name, plain in (("recompute", False), ("graphs", False), ("tp", 1)):
            if getattr(config, name) != plain:
                raise InputError(
                    f"the schedule offloads activations, and {name} {getattr(config, name)} does not go with that: "
                    f"take {name} {plain}, or leave O and L out"
                )
    for name, why in (
        ("recompute", "computes every layer once more by itself"),
        ("graphs", "replays forwards that keep what their backward needs"),
    ):
        if again and getattr(config, name):
            raise InputError(f"the schedule has {again[0]}, and {name} {why}: leave one of the two out")


def _check_posts(config: RunConfig) -> None:
    """Refuse stated sends and receives where no transport keeps to them."""
    if config.is_local and config.pipeline.communication is not None:
        raise InputError(
            "the schedule states where its messages are sent and received, and backend 'local' has no transport "
            "that waits for that: take communication 'derived', or backend 'gloo' or 'nccl'"
        )


def _check_window(config: RunConfig) -> None:
    """Refuse a window of receives that has no meaning or is too small."""
    if config.receive_window and config.pipeline.program.is_posted(config.streams):
        raise InputError(
            f"receive_window {config.receive_window} is of receives posted ahead, and here they are posted where "
            "they stand in the schedule: leave it out, or take communication 'derived' with streams 'link'"
        )
    needed = 0
    if config.receive_window:
        programs = {pipeline.microbatches: pipeline.program for pipeline in config.pipelines}
        needed = max(map(smallest_receive_window, programs.values()))
    if config.receive_window < needed:
        raise InputError(
            f"receive_window {config.receive_window} is too small: a rank of this schedule waits for ever unless "
            f"{needed} receives are posted at once on a link; take {needed} or more, or 0"
        )
