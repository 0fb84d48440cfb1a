"""Session: a configuration set up on workers, to measure, profile, verify and train with as often as needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import ppsim
from ppexec.calibrate.calibration import Calibration
from ppexec.calibrate.known_run import KnownRun, known_runs
from ppexec.calibrate.step_fit import calibrated
from ppexec.calibrate.tasks import run_known
from ppexec.config.config import RunConfig
from ppexec.machine.environment import describe_environment, is_crowded
from ppexec.measure import tasks
from ppexec.measure.allocator import AllocatorPeak
from ppexec.measure.assemble import RankMemory, assemble_trace
from ppexec.measure.ping import PingSample
from ppexec.measure.profile import Profile, summarise
from ppexec.models.load import load_model, resolve_factory
from ppexec.stage.tensor_parallel import check_plan
from ppexec.training import checkpoint
from ppexec.training.tasks import load_checkpoint, next_step, nudge, save_checkpoint
from ppexec.training.tasks import train as train_steps
from ppexec.training.train import TrainReport
from ppexec.verification.tasks import verify as verify_step
from ppexec.verification.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppexec.workers.session_workers import PoolWorkers, TorchrunWorkers, Workers, under_torchrun
from ppsim import Collectives, Link, Network, Reduction, StageCost, Trace
from ppsim.costs.by_microbatch import costs_of_copies
from ppsim.errors import InputError
from ppsim.files import check_directory

_Answer = TypeVar("_Answer")


class Session:
    """A configuration set up on workers. Use it as a context manager.

    Parameters
    ----------
    config : RunConfig
        What is run.
    pool : WorkerPool, optional
        The processes to run in. By default the session starts its own, and `close` ends them. Under torchrun the
        processes that torchrun started are the workers, and each of them must make the same calls.
    costs : sequence of StageCost, optional
        The cost of each stage. With costs the ranks wait for these times instead of computing. `compute="timed"` in the
        configuration does the same with the costs of its cost file.

    Raises
    ------
    InputError
        If the configuration cannot be run.
    WorkerError
        If a worker fails or dies. Every method may raise it too.

    Notes
    -----
    With data parallelism, replicas may have different numbers of microbatches. Where a method returns values of one
    replica, it is the longest: the first of those with the most microbatches.

    Examples
    --------
    >>> with Session(RunConfig(ranks=2)) as session:  # doctest: +SKIP
    ...     traces = session.measure(10)
    ...     stages = session.profile(3).stages
    """

    def __init__(
        self, config: RunConfig, *, pool: WorkerPool | None = None, costs: Sequence[StageCost] | None = None
    ) -> None:
        self.config = config = config.plain()
        for message in config.warnings():
            warnings.warn(message, stacklevel=2)
        self.costs = _stage_costs(config, costs)
        if self.costs is None:
            resolve_factory(config.model)
            if config.tp > 1 and ":" not in config.model:
                check_plan(load_model(config), config.tp)  # built-in models cost nothing until they are made real
        self._own_pool: WorkerPool | None = None
        self._workers: Workers
        if under_torchrun():
            self._workers = TorchrunWorkers(config, self.costs)
            return
        if pool is None:
            pool = self._own_pool = WorkerPool()
        try:
            pool.set_up(config, self.costs)
        except BaseException:
            self.close()
            raise
        self._workers = PoolWorkers(pool, config.world_size)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers that this session started."""
        if self._own_pool is not None:
            self._own_pool.close()

    def measure(self, steps: int, *, first_step: int = 0, replica: int | None = None) -> list[Trace]:
        """Run and time steps.

        Parameters
        ----------
        steps : int
            How many.
        first_step : int
            Number of the first step. It decides which data is read.
        replica : int, optional
            The replica to return traces of. By default the longest.

        Returns
        -------
        list of Trace
            One for each step. They hold no activation bytes, see `memory`. With tensor parallelism they are those of
            the first tensor-parallel rank.
        """
        replica = self.config.longest_replica if replica is None else replica
        by_rank = self._by_rank(tasks.measure, replica=replica, steps=steps, first_step=first_step)
        self._warn_of_losses()
        program = self.config.pipelines[replica].program
        specs = self.message_bytes if replica == self.config.longest_replica else self._message_bytes(replica)
        return [
            assemble_trace(program, [records[step] for records in by_rank], specs, conditions=self._conditions)
            for step in range(steps)
        ]

    @property
    def _conditions(self) -> ppsim.Conditions:
        """What a prediction has to assume about these ranks' streams."""
        return ppsim.Conditions(streams=self.config.streams, blocking=self.config.is_blocking)

    def run_known(self, known: KnownRun) -> Trace:
        """Run and time one step of a known run on these ranks."""
        program = known.schedule.program
        records = self._by_rank(run_known, known=known)
        return assemble_trace(program, records, [known.size_bytes] * len(program.messages), conditions=self._conditions)

    def calibrate(self, message_bytes: Sequence[int], *, action_s: float, rounds: int = 3) -> Calibration:
        """Measure what running a schedule costs on these ranks beside its computations.

        Parameters
        ----------
        message_bytes : sequence of int
            Sizes of the messages to predict.
        action_s : float
            Seconds that a forward takes in the known runs. Give that of the run to predict: the longer an action
            computes, the colder are the caches for the messages after it.
        rounds : int
            How often each known run is measured.
        """
        every = self.known_runs(message_bytes, action_s)
        for each in every:
            self.run_known(each)
        return calibrated([(self.run_known(each), each) for _ in range(rounds) for each in every])

    def known_runs(self, message_bytes: Sequence[int], action_s: float) -> list[KnownRun]:
        """The known runs that `calibrate` measures. Some keep cores busy, if computing ranks outnumber the cores."""
        return known_runs(
            self.config.ranks,
            message_bytes,
            action_s,
            stages_per_rank=-(-self.config.pipeline.stages // self.config.ranks),
            with_busy=self.costs is None and self.config.device == "cpu" and is_crowded(self.config),
        )

    def count_memory(self) -> list[list[int]]:
        """For each rank of the longest replica, the activation bytes after each row, from one untimed step."""
        return [rank.activation_bytes for rank in self.memory()]

    def memory(self) -> list[RankMemory]:
        """For each rank of the longest replica, all bytes that are counted in one untimed step.

        The optimizer's bytes are counted only after `train` or `load_checkpoint`, which make the optimizer.
        """
        return self._by_rank(tasks.count_memory)

    def device_peaks(self) -> list[AllocatorPeak]:
        """For each process of the longest replica, what a step takes of its GPU's memory."""
        return self._of_replica(tasks.device_peak)

    def _of_replica(self, task: Callable[..., _Answer], replica: int | None = None, **arguments: Any) -> list[_Answer]:
        """What the processes of a replica answer, one for each pipeline rank: its first tensor-parallel rank."""
        config, every = self.config, self._workers.call(task, **arguments)
        first = (config.longest_replica if replica is None else replica) * config.ranks * config.tp
        return every[first : first + config.ranks * config.tp : config.tp]

    def _by_rank(
        self, task: Callable[..., list[_Answer]], *, replica: int | None = None, **arguments: Any
    ) -> list[_Answer]:
        """What the pipeline ranks of a replica answer. A process holds several with `devices="shared"`."""
        return [answer for of_process in self._of_replica(task, replica, **arguments) for answer in of_process]

    @cached_property
    def receive_window(self) -> int | None:
        """Receives that each rank posts ahead on each link; None where none are posted."""
        return self._by_rank(tasks.receive_window)[0]

    def profile(self, rounds: int) -> Profile:
        """Measure layer costs, and stage costs of this cut, in `rounds` rounds on all ranks at once."""
        return self.summarise(self.profile_rounds(rounds))

    def stage_costs(
        self, profile: Profile, step: int, *, replica: int | None = None
    ) -> list[StageCost] | list[list[StageCost]]:
        """The costs to predict a step with, where its microbatches differ in size.

        Parameters
        ----------
        profile : Profile
            Of this session.
        step : int
            Number of the step; it decides which data is read.
        replica : int, optional
            The replica whose microbatches are meant. By default the longest.

        Returns
        -------
        list of list of StageCost, shape (stages, microbatches)
            As `ppsim.simulate` takes them. If all microbatches have one shape: one StageCost for each stage.

        Raises
        ------
        InputError
            For a kind of microbatch that was not profiled.
        """
        if not profile.by_shape:
            return profile.stages
        shapes = self.microbatch_shapes(step, replica=replica)
        if missing := set(shapes) - profile.by_shape.keys():
            raise InputError(
                f"step {step} has {len(missing)} kinds of microbatches that were not profiled: profile rounds that "
                "read such data (first_step)"
            )
        return [[profile.by_shape[shape][stage] for shape in shapes] for stage in range(self.config.pipeline.stages)]

    def microbatch_shapes(self, step: int, *, replica: int | None = None) -> list[str]:
        """The shape of each microbatch of a step, see `Batch.shapes`. By default on the longest replica."""
        return self._of_replica(tasks.shapes, replica, step=step)[0]

    def profile_rounds(
        self, rounds: int, *, first_step: int = 0, by_layer: bool = True, ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Measure rounds of a profile, to be gathered over several calls for `summarise`.

        Parameters
        ----------
        rounds : int
            How many.
        first_step : int
            Number of the step whose data the first round reads.
        by_layer : bool
            False times stages only, which takes half as long. At least one round must time layers.
        ranks : sequence of int, optional
            Where ranks share a process, those to profile at the same time; all unless given.

        Returns
        -------
        list
            For each rank its rounds.
        """
        self._refuse_timed("profile")
        every = self._workers.call(tasks.profile, rounds=rounds, first_step=first_step, by_layer=by_layer, ranks=ranks)
        return [samples for of_process in every for samples in of_process]

    def _warn_of_losses(self) -> None:
        """Warn of a loss that is no finite number, in the steps just run."""
        if self.costs is not None:
            return
        found = [(at, loss) for odd in self._workers.call(tasks.odd_losses) for at, loss in odd.items()]
        if found:
            (step, microbatch, sample), loss = min(found)
            others = f" ({len(found) - 1} more such losses)" if len(found) > 1 else ""
            warnings.warn(
                f"the loss of microbatch {microbatch} (from sample {sample} on) in step {step} is {loss}{others}: its "
                "gradients are no finite numbers either, and comparing them shows little; look at the data, the "
                "initial weights and the dtype",
                stacklevel=3,
            )

    def _refuse_timed(self, what: str) -> None:
        if self.costs is not None:
            raise InputError(f"timed compute has nothing to {what}: use compute='real'")

    def summarise(self, rounds_by_rank: list[Any]) -> Profile:
        """Sum up rounds by rank, from one or more calls of `profile_rounds`."""
        config = self.config
        return summarise(
            rounds_by_rank, config.layer_names, self.environment(), config.layer_sizes, copies=config.pipeline.copies
        )

    def probe_network(self) -> Network:
        """Measure each link of the program at the size of its largest message.

        All of the time, which includes waking up the receiver, is taken as latency.
        """
        samples = [sample for rank in self._by_rank(tasks.probe) for sample in rank]
        return Network(links={(s.source, s.destination): Link(latency_s=s.one_way_s) for s in samples})

    def probe_reduction(self) -> Reduction | None:
        """Measure what it takes to add up gradients over the replicas, or over the copies of the model.

        Returns
        -------
        Reduction or None
            Fitted to three sizes for each stage: all of its gradients, a half and a quarter of them, each added up
            while nothing else runs. None without replicas and copies, in an evaluation, if no stage has gradients, or
            if parameters are sharded (see `probe_collectives`).
        """
        if self._is_sharded:
            return None
        samples = [sample for process in self._workers.call(tasks.probe_reductions) for sample in process]
        if not samples:
            return None
        dp, copies = self.config.dp, self.config.pipeline.copies
        fitted = Reduction.fitted(dp * copies, [s.size_bytes for s in samples], [s.seconds for s in samples])
        return replace(fitted, replicas=dp)

    def probe_collectives(self) -> Collectives | None:
        """Measure what it takes to gather the parameters of each stage and to reduce its gradients over the replicas.

        Returns
        -------
        Collectives or None
            For each stage the seconds, measured while nothing else runs, the bytes of its whole parameters, and the
            bytes of the shares that ranks of the longest replica keep. None unless parameters are sharded.

        Notes
        -----
        `fully_shard` copies a stage's share into a buffer before it gathers, and the whole parameters out of it
        afterwards. On a CPU the rank makes these copies itself. The result counts them as part of the gathering, which
        runs beside computations. So a step that gathers ahead of use is predicted shorter, by the time of the copies.
        """
        if not self._is_sharded:
            return None
        every = self._of_replica(tasks.probe_collectives)
        by_stage = {stage: sample for of_process in every for stage, sample in of_process.items()}
        stages = [by_stage[stage] for stage in range(self.config.pipeline.stages)]
        return Collectives(
            replicas=self.config.dp,
            unshard_s=[sample.unshard_s for sample, _ in stages],
            reduce_s=[sample.reduce_s for sample, _ in stages],
            whole_bytes=[sample.full_bytes for sample, _ in stages],
            parameter_share_bytes=[share_bytes for _, share_bytes in stages],
            gradient_share_bytes=[sample.gradient_share_bytes for sample, _ in stages],
        )

    @property
    def _is_sharded(self) -> bool:
        """Whether the ranks hold shares of parameters. Ranks that wait instead of computing have no parameters."""
        return self.config.is_sharded and self.costs is None

    def probe_sizes(self, size_bytes: Sequence[int], *, rounds: int) -> list[PingSample]:
        """Measure messages of these sizes on every directed link between two ranks.

        Returns
        -------
        list of PingSample
            Sorted by size, then by link.
        """
        by_rank = self._by_rank(tasks.probe_by_size, size_bytes=list(size_bytes), rounds=rounds)
        samples = [sample for rank in by_rank for sample in rank]
        return sorted(samples, key=lambda sample: (sample.size_bytes, sample.source, sample.destination))

    def time_compute(self, rounds: int) -> list[list[dict[str, float]]]:
        """Measure F and B in a plain loop without messages. Each rank must have one stage.

        Returns
        -------
        list of list of dict
            For each rank and round: mean seconds `forward_s` and `backward_s` of a microbatch, and `whole_s` of the
            loop.
        """
        self._refuse_timed("compute")
        return self._by_rank(tasks.time_plain, rounds=rounds)

    def time_steps(self, executor: str | None, steps: int) -> list[float]:
        """Measure whole steps, from the first rank's start to the last rank's end.

        Parameters
        ----------
        executor : str or None
            One of `ppexec.measure.torch_schedules.PEERS`, or None for this runtime.
        steps : int
            How many.

        Returns
        -------
        list of float
            Seconds of each.
        """
        self._refuse_timed("compare")
        by_rank = self._by_rank(tasks.time_steps, executor=executor, steps=steps)
        return [
            (max(end for _, end in times) - min(begin for begin, _ in times)) / 1e9
            for times in zip(*by_rank, strict=True)
        ]

    def time_launches(self, steps: int) -> list[float] | None:
        """Measure how long the host takes to submit each action.

        Parameters
        ----------
        steps : int
            How many steps to run. Nothing else is timed in them.

        Returns
        -------
        list of float, shape (actions,), or None
            Host seconds of each action of the program. None on a CPU, where the host computes the action itself.
        """
        self._refuse_timed("launch")
        if self.config.device == "cpu":
            return None
        return [seconds for rank in self._by_rank(tasks.time_launches, steps=steps) for seconds in rank]

    def verify(self) -> VerifyReport:
        """Compare outputs and gradients of a step with one process without a pipeline."""
        self._refuse_timed("verify")
        comparisons = [comparison for process in self._workers.call(verify_step) for comparison in process]
        self._warn_of_losses()
        return VerifyReport.of(self.config, comparisons)

    def train(self, steps: int) -> TrainReport:
        """Train for some optimizer steps (AdamW).

        Parameters
        ----------
        steps : int
            How many. The first call starts at step 0, or after the loaded checkpoint, and each call after the last.

        Returns
        -------
        TrainReport
            With the loss of each step.

        Raises
        ------
        RunError
            If a loss or a gradient is not finite, unless the configuration skips such steps. Such a step updates no
            parameter.
        """
        self._refuse_timed("train")
        self._refuse_copies()
        if self.config.forward_only:
            raise InputError("a run with forward_only has no gradients to train with: leave forward_only out")
        return TrainReport.of(self.config, self._workers.call(train_steps, steps=steps)[0])

    @property
    def next_step(self) -> int:
        """Number of the training's next step."""
        return self._workers.call(next_step)[0]

    def save_checkpoint(self, directory: Path) -> Path:
        """Write parameters and optimizer state.

        Parameters
        ----------
        directory : Path
            On a file system that all processes share.

        Returns
        -------
        Path
            The folder of this step under it. Any mesh, schedule and partition of the same model can load it.

        Raises
        ------
        InputError, RunError
            If it cannot be written. InputError if that shows before writing begins.
        """
        self._refuse_timed("save")
        self._refuse_copies()
        check_directory(directory)
        return self._workers.call(save_checkpoint, directory=directory.absolute())[0]

    def load_checkpoint(self, directory: Path) -> int:
        """Continue from a checkpoint.

        Parameters
        ----------
        directory : Path
            The checkpoint's folder, or a directory of checkpoints. Of these the newest is loaded.

        Returns
        -------
        int
            Number of the next step.

        Raises
        ------
        InputError
            If there is no checkpoint, it is damaged, or of another model.
        """
        self._refuse_timed("load")
        self._refuse_copies()
        checkpoint.newest(directory)  # raises here rather than on every rank, if there is none
        return self._workers.call(load_checkpoint, directory=directory.absolute())[0]

    def _refuse_copies(self) -> None:
        if (copies := self.config.pipeline.copies) > 1:
            raise InputError(
                f"a training holds one copy of the model, and {self.config.pipeline.name} has {copies}: take a "
                "schedule in one direction to train"
            )

    def nudge(self) -> None:
        """Move every parameter by one rounding, to see how much rounding alone changes a training."""
        self._refuse_timed("nudge")
        self._workers.call(nudge)

    def environment(self) -> dict[str, Any]:
        """This machine, the versions of its software, and how the ranks ran."""
        config = self.config
        return describe_environment(
            ranks=config.ranks,
            processes=config.world_size,
            threads_per_rank=config.threads,
            backend=config.backend,
            worker_allocator=self._workers.call(tasks.allocator)[0],
            **({"multiprocessors": shares} if (shares := self._workers.call(tasks.device_shares)[0]) else {}),
        )

    @cached_property
    def message_bytes(self) -> list[int]:
        """Size of each message of the longest replica's program."""
        return self._message_bytes()

    def _message_bytes(self, replica: int | None = None) -> list[int]:
        return self._of_replica(tasks.message_bytes, replica)[0]


def _stage_costs(config: RunConfig, costs: Sequence[StageCost] | None) -> Sequence[StageCost] | None:
    """The cost of each stage where compute is timed; None where it is real."""
    if costs is None and config.compute == "timed":
        if config.layer_costs is None:
            raise InputError("timed compute needs costs: give a cost file, or profile the model first")
        # layer_sizes is the cut already: the number of layers of each stage, by whichever method was asked for
        costs = ppsim.partition(config.layer_costs, stages=config.pipeline.model_stages, method=config.layer_sizes)
    return None if costs is None else costs_of_copies(costs, config.pipeline.copies, config.pipeline.stages)
