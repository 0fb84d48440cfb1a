"""The command `ppsim plan`: which parallelism for this model on these devices."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ppsim.cli import ending
from ppsim.cli.architecture_flags import ArchitectureFlags
from ppsim.cli.command import OptionalFile, OptionalName, OptionalReal, OptionalWhole
from ppsim.cli.figure_flag import FigureFlag
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.estimate.machine import Machine
from ppsim.estimate.named_machines import machine_names, named_machine
from ppsim.export.text_table import text_table
from ppsim.files import check_files, write_text
from ppsim.planning.candidates import Choices, Cluster
from ppsim.planning.planner import plan
from ppsim.planning.plans import Plan, Plans

if TYPE_CHECKING:
    import plotly.graph_objects as go

_DEVICE_HELP = tyro.conf.arg(help=f"The device: {', '.join(machine_names())}.")
_SHOWN = 10  # plans in the printed table
_SHOWN_LOSERS = 5
_CHOSEN = ("tp", "pp", "dp", "cp", "ep", "b", "schedule", "v", "recompute")  # columns of what a plan chooses
_CSV = "schedule.csv"  # what the flags name where --csv writes none


@dataclass(frozen=True, kw_only=True)
class PlanCommand(FigureFlag, ArchitectureFlags):
    """Rank the ways to train a model on a number of devices: tp, pp, dp, micro batch, schedule, cut, recomputation."""

    devices: int
    """How many devices there are; all are used."""
    global_batch: int
    """Sequences of a step."""
    device: Essential[Annotated[OptionalName, _DEVICE_HELP]] = None
    machine: OptionalFile = None
    """A machine as ppsim fit-machine wrote it, .json; instead of --device."""
    devices_per_node: OptionalWhole = None
    """Devices that share a node (default: 8)."""
    seq: Essential[int] = 4096
    """Tokens of a sequence."""
    memory_gb: Essential[OptionalReal] = None
    """Memory of a device that may be used, in 10^9 bytes (default: all)."""
    schedules: OptionalName = None
    """Names of schedules that may be chosen, with commas (default: 1f1b,interleaved-1f1b,zb-h1,zb-v)."""
    cp: OptionalName = None
    """Numbers of context-parallel ranks that may be chosen, with commas, as 1,2,4 (default: 1)."""
    keep: int = 20
    """How many of the fastest are predicted exactly; the rest may be ruled out by bounds."""
    csv: Essential[OptionalFile] = None
    """Write the best plan's schedule in PyTorch's CSV format; torchtitan's flags name the file."""
    table: OptionalFile = None
    """Write all plans, .csv."""
    json: Essential[bool] = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Plan, write what the flags ask for, and print."""
        check_files(self.csv, self.table)
        self.check_figure()
        choices = Choices()
        if self.schedules is not None:
            choices = replace(choices, schedules=tuple(self.schedules.split(",")))
        if self.cp is not None:
            choices = replace(choices, cp=_whole_numbers("--cp", self.cp))
        limit_bytes = None if self.memory_gb is None else self.memory_gb * 1e9
        if limit_bytes is not None and not (math.isfinite(limit_bytes) and limit_bytes > 0):
            raise InputError(f"--memory-gb must be finite and above 0, got {self.memory_gb!r}")
        plans = plan(
            self.architecture(self.seq),
            Cluster(machine=self._machine(), devices=self.devices),
            global_batch=self.global_batch,
            seq=self.seq,
            choices=choices,
            memory_limit_bytes=None if limit_bytes is None else int(limit_bytes),
            keep=self.keep,
        )
        if self.csv is not None:
            write_text(self.csv, plans.best.schedule.to_csv())
        if self.table is not None:
            write_text(self.table, plans.to_frame().to_csv(index=False))
        self.draw(lambda: _figure(plans))
        if self.json:
            ending.print_json(_document(plans, self._csv_name))
        else:
            print(_text(plans, self._csv_name))

    @property
    def _csv_name(self) -> str:
        return _CSV if self.csv is None else str(self.csv)

    def _machine(self) -> Machine:
        if (self.device is None) == (self.machine is None):
            raise InputError("give --device NAME or --machine FILE, one of them")
        if self.machine is None:
            return named_machine(str(self.device), devices_per_node=self.devices_per_node)
        machine = Machine.from_file(self.machine)
        if self.devices_per_node is None:
            return machine
        return replace(machine, devices_per_node=self.devices_per_node)


def _whole_numbers(flag: str, given: str) -> tuple[int, ...]:
    """The numbers of a list with commas. Raises InputError for what is none."""
    words = given.split(",")
    wrong = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) < 10)), None)
    if wrong is not None:
        raise InputError(f"{flag} must be whole numbers with commas, as 1,2,4, got {given!r}")
    return tuple(map(int, words))


def _figure(plans: Plans) -> go.Figure:
    """Time against memory."""
    from ppsim.plots.plans_figure import time_against_memory

    return time_against_memory(plans)


def _document(plans: Plans, csv: str) -> dict[str, Any]:
    best = plans.best
    return {
        "considered": plans.considered,
        "best": {
            **best.row,
            "parts_s": dict(best.parts_s),
            "memory_by_kind_bytes": dict(best.memory_bytes),
            "blocks": list(best.step.stage_blocks),
            "megatron_flags": best.megatron_flags,
            "torchtitan_flags": best.torchtitan_flags(csv),
        },
        "ranked": [each.row for each in plans],
        "losers": [each.row for each in plans.losers],
        "pareto": [each.row for each in plans.pareto],
        "model": asdict(best.step.model),
    }


def _text(plans: Plans, csv: str) -> str:
    best = plans.best
    counts = Counter(
        "do not fit" if each.fits is False else "ruled out by a bound" if each.is_bound else "slower"
        for each in plans.losers
    )
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in best.parts_s.items() if seconds > 0)
    memory = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in best.memory_bytes.items() if size > 0)
    beaten = [each for each in plans.losers if each.is_bound and each.fits is not False][:_SHOWN_LOSERS]
    too_large = [each for each in plans.losers if each.fits is False]
    nearest = heapq.nsmallest(_SHOWN_LOSERS, too_large, key=lambda each: each.total_bytes)
    lines = [
        f"{plans.considered} plans considered: {summary or 'no other'}",
        "",
        _table(plans[:_SHOWN]),
        "",
        f"best step: {parts}",
        f"memory of its fullest rank (GB): {memory}",
        f"layout: {best.layout}",
        "",
        "torchtitan: " + _flags(best.torchtitan_flags(csv)),
        "Megatron-LM: " + _flags(best.megatron_flags),
    ]
    for title, rows in (("ruled out by a bound, the fastest:", beaten), ("do not fit, the smallest:", nearest)):
        if rows:
            lines += ["", title, *(f"  {each.step.words}{_cut(each)}: {each.reason}" for each in rows)]
    return "\n".join(lines)


def _cut(each: Plan) -> str:
    """How the blocks are cut, of a plan that does not cut them evenly."""
    return "" if each.step.blocks is None else f", {each.layout}"


def _flags(given: list[str] | None) -> str:
    return "cannot be told this plan" if given is None else " ".join(given)


def _table(shown: Sequence[Plan]) -> str:
    """A row for each plan; cp and ep where there are any, and the layout where plans differ in nothing else."""
    rows = [_cells(each) for each in shown]
    unused = {name for name in ("cp", "ep") if all(row[name] == 1 for row in rows)}
    choices = [tuple(row[name] for name in _CHOSEN) for row in rows]
    if len(set(choices)) == len(choices):
        unused.add("layout")
    return text_table([{name: value for name, value in row.items() if name not in unused} for row in rows])


def _cells(each: Plan) -> dict[str, Any]:
    step = each.step
    return {
        "tp": step.tp,
        "pp": step.pp,
        "dp": step.dp,
        "cp": step.cp,
        "ep": step.ep,
        "b": step.micro_batch_size,
        "m": step.microbatches,
        "schedule": step.schedule,
        "v": step.stages_per_rank,
        "recompute": step.recompute,
        "layout": each.layout,
        "step (s)": f"{each.step_s:.4g}",
        "bubble": f"{each.parts_s['bubble'] / each.step_s:.1%}",
        "used": f"{each.utilisation:.1%}",
        "GB": f"{each.total_bytes / 1e9:.1f}",
        "why": each.reason,
    }
