"""Flags: what a command line says of the schedule, of its costs and of the network, read into the values themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from ppsim.cli.command import OptionalFile, OptionalName, OptionalReal, OptionalWhole
from ppsim.cli.ending import printable
from ppsim.costs.cost_file import load_costs
from ppsim.costs.partition import Method, partition
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.files import read_text
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.named.registry import build_schedule, natural_stages_per_rank, schedule_names
from ppsim.schedule.schedule import Communication, Schedule

MOST_ACTIONS = 8_000_000  # about 4 GB and minutes to simulate; more is a typing error rather than a pipeline
_MOST_RANKS = 100_000
_SCHEDULE_HELP = tyro.conf.arg(help=f"Built-in schedule: {', '.join(schedule_names())}.")


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """Which schedule: one that is built in, or a file."""

    schedule: Essential[Annotated[OptionalName, _SCHEDULE_HELP]] = None
    ranks: Essential[OptionalWhole] = None
    """p, the number of pipeline ranks; with --schedule."""
    microbatches: Essential[OptionalWhole] = None
    """m, the number of microbatches of a step; with --schedule."""
    stages_per_rank: Essential[OptionalWhole] = None
    """v, the number of stages on each rank; with --schedule, which has a natural one."""
    microbatch_group: OptionalWhole = None
    """Microbatches of a round of an interleaved schedule; with --schedule (default: the ranks, or a few more)."""
    from_csv: Essential[OptionalFile] = None
    """Schedule in PyTorch's CSV format, a row per rank and a cell per action such as 2F0; instead of --schedule."""
    copies: OptionalWhole = None
    """Copies of the model that the file's stages are of, where microbatches go in both directions; with --from-csv
    (default: 1)."""
    communication: Communication = "as-given"
    """Where receives are posted: as the file has them; early, when the message is sent, which hangs on no streams;
    late, at their use; or derived, as where a file has none."""

    def load_schedule(self) -> Schedule:
        """The checked schedule. Raises InputError for flags that are missing, contradict or cannot be met."""
        return self._load().with_communication(self.communication)

    def _load(self) -> Schedule:
        self.refuse_both()
        if self.from_csv is not None:
            text = read_text(self.from_csv)
            try:
                schedule = Schedule.from_csv(
                    text, name=printable(self.from_csv.name), copies=1 if self.copies is None else self.copies
                )
                schedule.check()
            except ValueError as error:
                raise InputError(f"{self.from_csv}: {error}") from None
            return schedule
        if self.copies is not None:
            raise InputError(f"{flag_of('copies')} says what a file holds: give --from-csv too, or leave it out")
        if self.schedule is None:
            raise InputError("no schedule: give --schedule, --ranks and --microbatches, or --from-csv FILE")
        if self.ranks is None or self.microbatches is None:
            missing = "ranks" if self.ranks is None else "microbatches"
            raise InputError(f"--schedule {self.schedule} needs --{missing}: give a whole number of 1 or more")
        _refuse_giants(self.schedule, self.ranks, self.microbatches, self.stages_per_rank)
        schedule = build_schedule(
            self.schedule,
            ranks=self.ranks,
            microbatches=self.microbatches,
            stages_per_rank=self.stages_per_rank,
            microbatch_group=self.microbatch_group,
        )
        schedule.check()
        return schedule

    def refuse_both(self) -> None:
        """Raise InputError if a file and a built-in schedule are both given."""
        for flag in ("schedule", "ranks", "microbatches", "stages_per_rank", "microbatch_group"):
            if self.from_csv is not None and getattr(self, flag) is not None:
                raise InputError(f"--from-csv holds the whole schedule: leave out {flag_of(flag)} or --from-csv")


def _refuse_giants(name: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> None:
    """Refuse sizes that would fill the memory before anything could complain."""
    if ranks > _MOST_RANKS:
        raise InputError(f"--ranks {ranks} is more than this can hold: take at most {_MOST_RANKS}")
    stages = ranks * (natural_stages_per_rank(name) if stages_per_rank is None else stages_per_rank)
    if ranks > 0 and stages > 0 and 2 * stages * microbatches > MOST_ACTIONS:
        most = MOST_ACTIONS // (2 * stages)
        remedy = f"at most {most} microbatches or fewer stages" if most else "fewer stages"
        raise InputError(
            f"{stages} stages and --microbatches {microbatches} make {2 * stages * microbatches} actions, at most "
            f"{MOST_ACTIONS} can be held: take {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class CostFlags:
    """What a microbatch costs: one set of numbers for all stages, or a file of layers; F = I = W = 1 s unless given."""

    forward_s: Essential[OptionalReal] = None
    """F on each stage, in seconds."""
    backward_input_s: Essential[OptionalReal] = None
    """I on each stage, the backward for the input, in seconds."""
    backward_weight_s: Essential[OptionalReal] = None
    """W on each stage, the backward for the weights, in seconds."""
    backward_s: OptionalReal = None
    """B on each stage, the full backward at once, in seconds (default: I + W)."""
    activation_bytes: Essential[OptionalWhole] = None
    """Bytes that a microbatch holds on a stage from the start of F to the end of B (default: 0)."""
    weight_activation_bytes: OptionalWhole = None
    """Bytes that it holds from the end of I to the end of W where the backward is split (default: 0)."""
    output_bytes: OptionalWhole = None
    """Bytes of a message between stages, either way (default: 0)."""
    parameter_bytes: OptionalWhole = None
    """Bytes of the weights of a stage, and of their gradients (default: 0)."""
    costs: Essential[OptionalFile] = None
    """Layer costs, .json or .csv, cut into stages by --partition; instead of the flags above."""
    partition: OptionalName = None
    """How layers become stages: even, optimal, or counts such as 3,2,3; with --costs (default: even)."""
    layout: OptionalName = None
    """How layers become stages, as Megatron's --pipeline-model-parallel-layout has it, with a letter for each layer:
    'Et*3|(tt|)*29m|L'; with --costs, instead of --partition."""

    free_outputs: bool = False
    """Let stages free what they have sent, as Megatron-LM does; with --costs."""

    def stage_costs(self, stages: int, kinds: set[int]) -> list[StageCost]:
        """Each stage's cost, from a file or the same for all; `kinds`: those that actions have."""
        uniform = {name: getattr(self, name) for name in _UNIFORM if getattr(self, name) is not None}
        if self.costs is not None:
            if uniform:
                raise InputError(
                    f"--costs holds every stage's cost: leave out {flag_of(next(iter(uniform)))} or --costs"
                )
            if self.layout is not None and self.partition not in (None, "layout"):
                raise InputError("--layout says how layers are cut: leave out --partition or --layout")
            layers = load_costs(self.costs)
            method = _method(self.partition) if self.layout is None else "layout"
            return partition(layers, stages=stages, method=method, layout=self.layout, frees_outputs=self.free_outputs)
        if self.free_outputs:
            raise InputError("--free-outputs is of stages cut from a cost file: give it with --costs FILE")
        for name in ("partition", "layout"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"--{name} {getattr(self, name)} cuts the layers of a cost file: give it with --costs FILE"
                )
        if not uniform:
            return [StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)] * stages
        missing = self._missing_costs(kinds)
        if missing:
            raise InputError(f"{flag_of(missing)} is missing: give it in seconds, or all costs with --costs FILE")
        # What no action of this schedule takes may be left out, but a StageCost has a number for everything.
        return [StageCost(**{"backward_input_s": 0.0, "backward_weight_s": 0.0, **uniform})] * stages

    def _missing_costs(self, kinds: set[int]) -> str | None:
        """The first cost that some action takes and no flag gives."""
        needed = ["forward_s"]
        if kinds & {Kind.I, Kind.W} or (Kind.B in kinds and self.backward_s is None):
            needed += ["backward_input_s", "backward_weight_s"]
        return next((name for name in needed if getattr(self, name) is None), None)


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """What a message costs: one link for all pairs of ranks, or a file of links."""

    latency_s: Essential[OptionalReal] = None
    """Seconds from a message's leaving its link to its arrival (default: 0)."""
    bytes_per_s: Essential[OptionalReal] = None
    """Bandwidth of each directed link between two ranks, in bytes per second (default: no limit)."""
    network: OptionalFile = None
    """Links as measured by studies/link.py, .json; instead of the two flags above."""
    slow_link: OptionalName = None
    """Links on which everything takes longer, from rank to rank, as in 0-1=3,1-0=3."""

    def load_network(self, ranks: int) -> Network:
        """The links between that many ranks. Raises InputError for flags that contradict or cannot be."""
        network = self._network()
        return network if self.slow_link is None else network.slowed(_slow_links(self.slow_link, ranks))

    def _network(self) -> Network:
        given = {name: getattr(self, name) for name in ("latency_s", "bytes_per_s") if getattr(self, name) is not None}
        if self.network is None:
            return Network(**given)
        if given:
            raise InputError(f"--network holds every link: leave out {flag_of(next(iter(given)))} or --network")
        return Network.from_file(self.network)


_UNIFORM = (
    "forward_s",
    "backward_input_s",
    "backward_weight_s",
    "backward_s",
    "activation_bytes",
    "weight_activation_bytes",
    "output_bytes",
    "parameter_bytes",
)


def numbers_by_name(text: str, wanted: str) -> dict[str, float]:
    """`a=1.5,b=2` as names and finite numbers > 0. Raises InputError that says `wanted`."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        try:
            factor = float(number)
        except ValueError:
            raise InputError(wanted) from None
        if not equals or name in found or not (math.isfinite(factor) and factor > 0):
            raise InputError(wanted)
        found[name] = factor
    return found


def flag_of(name: str) -> str:
    """A field as its flag is written."""
    return "--" + name.replace("_", "-")


def _slow_links(text: str, ranks: int) -> dict[tuple[int, int], float]:
    wanted = f"--slow-link {text}: give links and factors, as in 0-1=3 for the link from rank 0 to rank 1"
    found = {}
    for name, factor in numbers_by_name(text, wanted).items():
        source, _, destination = name.partition("-")
        if not (source.isdecimal() and destination.isdecimal()):
            raise InputError(wanted)
        if source == destination or max(int(source), int(destination)) >= ranks:
            raise InputError(f"--slow-link {text}: {name} is no link between the ranks 0 to {ranks - 1}")
        found[int(source), int(destination)] = factor
    return found


def _method(text: str | None) -> Method:
    """even, optimal, or counts such as 3,2,3."""
    if text is None:
        return "even"
    if not text[:1].isdigit() and "," not in text:
        return text
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise InputError(f"--partition {text}: give even, optimal, or the layers of each stage as in 3,2,3") from None
