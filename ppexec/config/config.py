"""Config: one run, as the command line's flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import ppsim
from ppexec.config.batch_sizes import batch_sizes, counts_by_replica, samples_of
from ppexec.config.bubble_warning import bubble_warning
from ppexec.config.combinations import check_graphs, check_schedule, check_training
from ppexec.config.devices import check_backend_limits, check_gpus, check_processes, choose_device
from ppexec.config.divisors import largest_divisor
from ppexec.config.groups import (
    BatchConfig,
    MachineConfig,
    ModelConfig,
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)
from ppexec.config.layer_cut import sizes_of_layout, sizes_of_partition
from ppsim.checks import check_fields, check_whole
from ppsim.errors import InputError
from ppsim.files import read_text

_PRESETS: dict[str, dict[str, int]] = {
    "small": {"hidden": 512, "seq": 64, "micro_batch_size": 2},
    "assignment": {"hidden": 4096, "seq": 8192, "micro_batch_size": 2},
}
# Larger values are likely typing errors: every rank is a process, and every action passes through Python.
_MOST = {
    "ranks": 256,
    "dp": 4096,
    "tp": 4096,
    "microbatches": 100_000,
    "layers": 100_000,
    "threads": 1024,
    "steps": 1_000_000,
    "warmup": 1_000_000,
    "evaluate_steps": 1_000_000,
    "accumulate": 100_000,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(MachineConfig, TrainingConfig, StepsConfig, ParallelConfig, ScheduleConfig, BatchConfig, ModelConfig):
    """What to run, where, and how often. The fields are the flags of the command line.

    Raises
    ------
    InputError
        For a run that cannot be, with the value and the remedy.

    Examples
    --------
    Numbers that are 0 are filled in:

    >>> config = RunConfig(schedule="1f1b", ranks=4, microbatches=8, layers=8, dp=2)
    >>> config.layer_sizes, config.hidden, config.global_batch_size, config.world_size
    ([2, 2, 2, 2], 512, 32, 8)

    Values that do not fit are refused before a process starts:

    >>> RunConfig(layers=3, ranks=2)
    Traceback (most recent call last):
    ppsim.errors.InputError: 3 layers do not divide evenly over 2 stages: take 2 or 4 layers, or 1 or 3 stages, ...
    """

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("layers", "dp", "tp", "steps", "accumulate", "evaluate_steps"):
            self._at_least(name, 1)
        sizes = ("hidden", "intermediate", "seq", "micro_batch_size", "microbatches", "global_batch_size", "ranks")
        counts = ("warmup", "shard", "evaluate_every", "learning_rate_warmup", "learning_rate_decay_steps")
        for name in (*sizes, *counts, "threads", "receive_window"):
            self._at_least(name, 0)
        if not 0 < self.timeout_s < 1e7:
            raise InputError(f"timeout_s must be seconds > 0 (and below 1e7), got {self.timeout_s}")
        check_training(self)
        self._set("device", choose_device(self.device, backend=self.backend, streams=self.streams))
        check_backend_limits(self.devices, backend=self.backend, dp=self.dp, tp=self.tp)
        check_graphs(self)
        preset = _PRESETS[self.preset]
        for name in ("hidden", "seq"):
            self._default(name, preset[name])
        self._default("intermediate", 4 * self.hidden)
        self._settle_model()
        microbatches, size = batch_sizes(
            global_batch_size=self.global_batch_size,
            microbatches=self.microbatches_by_replica,
            micro_batch_size=self.micro_batch_size,
            usual_size=preset["micro_batch_size"],
        )
        self._set("microbatches", microbatches)
        self._at_least("microbatches", 0)
        self._set("micro_batch_size", size)
        schedule = self.pipeline
        self._default("ranks", schedule.ranks)
        self._default("microbatches", schedule.microbatches)
        self._default("global_batch_size", self.step_microbatches * self.micro_batch_size)
        # torchrun says how many of the processes are on this machine; they may differ from one to the next.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or self.world_size * (self.ranks if self.is_local else 1)
        self._default("threads", max((os.cpu_count() or 1) // here, 1))
        check_processes(dp=self.dp, ranks=self.ranks, tp=self.tp)
        if self.backend == "nccl" and self.devices != "shared":
            check_gpus(self.world_size)
        check_schedule(self)
        self.layer_costs, self.layer_sizes  # noqa: B018  (refuse a bad file or cut now, not in the workers)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        check_whole(name, value, least=least)
        most = _MOST.get(name, 2**31)
        if value > most:
            raise InputError(f"{name} must be at most {most} in a real run, got {value} (a simulation takes more)")

    def _set(self, name: str, value: int | str) -> None:
        object.__setattr__(self, name, value)

    def _default(self, name: str, value: int) -> None:
        if getattr(self, name) == 0:
            self._set(name, value)

    def _settle_model(self) -> None:
        """Check and fill in the fields of one kind of model."""
        self._at_least("heads", 0)
        self._at_least("vocabulary", 0)
        if isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be a probability, 0 <= dropout < 1, got {self.dropout!r}")
        if self.text is not None and not self.text.is_file():
            raise InputError(f"text {self.text} is not a file: give the path of one")
        if self.model == "mlp":
            for name in ("heads", "vocabulary", "text", "dropout", "tied"):
                if getattr(self, name):
                    raise InputError(f"{name}={getattr(self, name)} has no meaning for model 'mlp': take --model gpt")
        if self.model == "gpt":
            self._default("vocabulary", 256)
            if self.vocabulary < 256:
                raise InputError(f"vocabulary must be 256 (one for each byte) or more, got {self.vocabulary}")
            wanted = max(self.hidden // 64, 4)
            self._default("heads", largest_divisor(self.hidden, most=wanted))
            for what, value in (("hidden", self.hidden), ("heads", self.heads)):
                by, count = ("heads", self.heads) if what == "hidden" else ("tp", self.tp)
                if value % count:
                    fitting = largest_divisor(value, most=count)
                    raise InputError(f"{what} {value} does not divide by {by} {count}: take {by} {fitting} for example")

    @property
    def is_sharded(self) -> bool:
        """Whether each replica holds a share of the parameters. A file's UNSHARD means nothing without replicas."""
        return (
            self.dp > 1
            and self.compute == "real"
            and bool((self.pipeline.program.collectives.kind == ppsim.Kind.UNSHARD).any())
        )

    @property
    def is_blocking(self) -> bool:
        """Whether ranks copy activations and reduce sharded gradients between their actions, instead of beside them.

        See `ppsim.Conditions.blocking`. A CPU has no streams for that.
        """
        return self.device == "cpu" and (self.pipeline.offload is not None or self.is_sharded)

    @property
    def world_size(self) -> int:
        """Number of processes: dp x ranks x tp, or 1 with backend "local"."""
        return 1 if self.is_local else self.dp * self.ranks * self.tp

    @property
    def longest_wait_s(self) -> float:
        """Seconds that one rank waits for another. It is long: a rank that still computes is no fault.

        Under torchrun, where no process watches the others, it is what ends a run that hangs.
        """
        return 20 * self.timeout_s

    @property
    def is_local(self) -> bool:
        """Whether all ranks are in one process."""
        return self.backend == "local"

    def samples_of(self, microbatch: int) -> range:
        """The global indices of a microbatch's samples, by its own global index.

        Examples
        --------
        >>> config = RunConfig(global_batch_size=8, microbatches=3)
        >>> [config.samples_of(microbatch) for microbatch in range(4)]
        [range(0, 3), range(3, 6), range(6, 8), range(8, 11)]
        """
        return samples_of(microbatch, microbatches=self.step_microbatches, samples=self.global_batch_size)

    @property
    def microbatches_by_replica(self) -> tuple[int, ...]:
        """How many microbatches each replica has in a step (with accumulate: in a round), shape (dp,).

        Examples
        --------
        >>> config = RunConfig(dp=2, replica_microbatches="5,4")
        >>> config.microbatches_by_replica, config.microbatches, config.step_microbatches, config.global_batch_size
        ((5, 4), 5, 9, 18)
        """
        if not self.replica_microbatches:
            return (self.microbatches,) * self.dp
        return counts_by_replica(self.replica_microbatches, dp=self.dp, microbatches=self.microbatches)

    @property
    def step_microbatches(self) -> int:
        """How many microbatches all replicas have together in a step (with accumulate: in a round)."""
        return sum(self.microbatches_by_replica)

    @property
    def longest_replica(self) -> int:
        """The first of the replicas with the most microbatches: the one that is predicted and shown."""
        return self.microbatches_by_replica.index(max(self.microbatches_by_replica))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def pipeline(self) -> ppsim.Schedule:
        """The checked schedule, without its backwards if `forward_only`; that of the longest replica."""
        return self.pipelines[self.longest_replica]

    @cached_property
    def pipelines(self) -> tuple[ppsim.Schedule, ...]:
        """The checked schedule of each replica, shape (dp,); one object for all that have as many microbatches."""
        if not self.replica_microbatches:
            return (self._checked_schedule(self.microbatches),) * self.dp
        if self.from_csv is not None:
            raise InputError(
                f"replica_microbatches {self.replica_microbatches} builds a schedule for each replica, and "
                f"{self.from_csv} is of {self.dp} replicas that do the same: leave it out, or take a schedule by name"
            )
        counts = self.microbatches_by_replica
        found: dict[int, ppsim.Schedule] = {}
        for replica, count in enumerate(counts):
            try:
                found[count] = found[count] if count in found else self._checked_schedule(count)
            except InputError as error:
                raise InputError(f"replica {replica}, {count} microbatches: {error}{self._near(count)}") from None
        return tuple(found[count] for count in counts)

    def _near(self, count: int) -> str:
        """The nearest numbers of microbatches that the schedule takes, as the end of a complaint about another."""
        reach = 2 * max(self.ranks or 2, self.microbatch_group or 0)
        ways = range(count - 1, max(count - 1 - reach, 0), -1), range(count + 1, count + 1 + reach)
        fitting = [str(found) for way in ways if (found := next(filter(self._takes, way), None)) is not None]
        return f"; for this replica {' or '.join(fitting)} microbatches would do" if fitting else ""

    def _takes(self, microbatches: int) -> bool:
        try:
            self._checked_schedule(microbatches)
        except InputError:
            return False
        return True

    def _checked_schedule(self, microbatches: int) -> ppsim.Schedule:
        if self.from_csv is None:
            if self.copies is not None:
                raise InputError(f"copies {self.copies} says what a file holds: give from_csv too, or leave it out")
            schedule = ppsim.build_schedule(
                self.schedule,
                ranks=self.ranks or 2,
                microbatches=microbatches or 8,
                stages_per_rank=self.stages_per_rank,
                microbatch_group=self.microbatch_group,
            )
        else:
            schedule = self._read_csv(self.from_csv)
        if self.shard:
            schedule = schedule.with_sharding(self.shard)
        schedule = schedule.with_communication(self.communication)
        if self.forward_only:
            schedule = schedule.forward_only()
        schedule.check(self.streams)
        return schedule

    def _read_csv(self, path: Path) -> ppsim.Schedule:
        try:
            copies = 1 if self.copies is None else self.copies
            schedule = ppsim.Schedule.from_csv(read_text(path), name=path.stem, copies=copies)
        except ppsim.ScheduleError as error:
            raise InputError(f"{path}: {error}") from None
        for name in ("ranks", "microbatches"):
            if getattr(self, name) not in (0, getattr(schedule, name)):
                raise InputError(
                    f"{path} has {getattr(schedule, name)} {name}, but {name} is {getattr(self, name)}: leave it out"
                )
        for name in ("stages_per_rank", "microbatch_group"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} {getattr(self, name)} is of a schedule by name, and {path} says what each rank does: "
                    "leave it out"
                )
        return schedule

    @cached_property
    def layer_costs(self) -> list[ppsim.LayerCost] | None:
        """The costs in the file `costs`, one for each layer of the chain; None without a file."""
        if self.costs is None:
            return None
        costs = ppsim.load_costs(self.costs)
        ends = sum(self._ends)
        if len(costs) != self.chain_length:
            which = f"layers is {self.layers}" + (f" with {ends} more for embedding and head" if ends else "")
            fitting = len(costs) - ends
            remedy = f"pass {fitting}" if fitting > 0 else "profile this model"
            raise InputError(f"{self.costs} has {len(costs)} layers, but {which}: {remedy}")
        return costs

    @property
    def _ends(self) -> tuple[int, int]:
        """Layers of the chain that `layers` does not count: before, and after those that it counts."""
        return (1, 1) if self.model == "gpt" else (0, 0)

    @property
    def chain_length(self) -> int:
        """Number of layers of the model: `layers`, and a GPT's embedding and head."""
        return self.layers + sum(self._ends)

    @property
    def layer_names(self) -> list[str]:
        """The name of each layer of the chain in profiles."""
        before, after = self._ends
        inner = [f"{self.model} {layer}" for layer in range(self.layers)]
        return [f"{self.model} embedding"] * before + inner + [f"{self.model} head"] * after

    @cached_property
    def layer_sizes(self) -> list[int]:
        """The number of layers of each stage of the model, a GPT's embedding and head among them."""
        stages = self.pipeline.model_stages
        if self.layout is None:
            work_s = None if self.layer_costs is None else [layer.work_s for layer in self.layer_costs]
            return sizes_of_partition(self.partition, layers=self.layers, ends=self._ends, stages=stages, work_s=work_s)
        if self.partition != "even":
            raise InputError(
                f"layout says how layers are cut: leave out partition {self.partition!r} or layout {self.layout!r}"
            )
        return sizes_of_layout(self.layout, model=self.model, layers=self.layers, ends=self._ends, stages=stages)

    @property
    def stage_of_layers(self) -> list[int]:
        """The stage of each layer of the chain, in the first copy of the model."""
        return [stage for stage, size in enumerate(self.layer_sizes) for _ in range(size)]

    def warnings(self) -> list[str]:
        """What the user may want to know before a run that is possible."""
        return bubble_warning(self.pipeline)

    def plain(self) -> RunConfig:
        """This configuration without the fields of a subclass (a command or study), as workers are given it."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(RunConfig)})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
