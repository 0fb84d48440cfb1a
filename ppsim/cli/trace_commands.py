"""Trace commands: the subcommands of `ppsim` that read saved traces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ppsim.cli import ending
from ppsim.cli.command import OptionalFile, OptionalName
from ppsim.cli.figure_flag import FigureFlag
from ppsim.cli.flags import CostFlags
from ppsim.errors import InputError
from ppsim.explain.attribution import attribute
from ppsim.explain.comparison import compare
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SAVED = "as `ppsim simulate --out` and `ppexec run --out` write it to a name without .json or .csv"


@dataclass(frozen=True, kw_only=True)
class AttributeCommand(FigureFlag):
    """Say what each rank waited for in a step, and what its critical path is. Reads a saved trace."""

    trace: tyro.conf.Positional[Path]
    """A saved trace, as `ppsim simulate --out` and `ppexec run --out` write it (not .json, not .csv)."""
    costs: OptionalFile = None
    """Layer costs, .json or .csv: what actions should take, instead of what each usually takes in this step."""
    partition: OptionalName = None
    """How the layers were cut into stages: even, optimal, or counts such as 3,2,3; with --costs (default: even)."""
    layout: OptionalName = None
    """How the layers were cut into stages, as Megatron's --pipeline-model-parallel-layout has it; with --costs."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Attribute the trace, draw its parts, and print the result."""
        self.check_figure()
        trace = load_trace(self.trace)
        costs = CostFlags(costs=self.costs, partition=self.partition, layout=self.layout)
        is_expected = any(each is not None for each in (self.costs, self.partition, self.layout))
        found = attribute(
            trace, expected=costs.stage_costs(trace.schedule.model_stages, set()) if is_expected else None
        )
        self.draw(lambda: _bars({trace.schedule.name: trace}))
        if self.json:
            ending.print_json(found.to_dict())
        else:
            print(found)


@dataclass(frozen=True, kw_only=True)
class CompareCommand(FigureFlag):
    """Say which actions, links and devices make one step longer than another of the same program; from saved traces."""

    predicted: tyro.conf.Positional[Path]
    """A saved trace, as `ppsim simulate --out` writes it (not .json, not .csv); or any other step to compare with."""
    measured: tyro.conf.Positional[Path]
    """Another saved trace of the same program, as `ppexec run --out` writes it."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Compare the traces, draw one above the other, and print the result."""
        self.check_figure()
        predicted, measured = load_trace(self.predicted), load_trace(self.measured)
        found = compare(predicted, measured)
        self.draw(lambda: _above_each_other({str(self.predicted): predicted, str(self.measured): measured}))
        if self.json:
            ending.print_json(found.to_dict())
        else:
            print(found)


def _bars(traces: dict[str, Trace]) -> go.Figure:
    from ppsim.plots.attribution_figure import attribution

    return attribution(traces)


def _above_each_other(traces: dict[str, Trace]) -> go.Figure:
    from ppsim.plots.timeline_figure import timeline

    return timeline(traces)


def load_trace(path: Path) -> Trace:
    """Read a saved trace. Raises InputError that says how to write one if the file's name promises another format."""
    if path.name.endswith((".json", ".json.gz", ".csv")) and path.exists():
        raise InputError(f"{path} is not a saved trace, and such files cannot be read back: give a trace {_SAVED}")
    return Trace.load(path)
