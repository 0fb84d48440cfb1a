"""The command `ppsim simulate`: predict one step, or the distribution of its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ppsim.cli import ending
from ppsim.cli.command import OptionalFile, OptionalName
from ppsim.cli.condition_flags import ConditionFlags
from ppsim.cli.figure_flag import FigureFlag
from ppsim.cli.flags import CostFlags, NetworkFlags, ScheduleFlags
from ppsim.cli.jitter_flags import JitterFlags
from ppsim.cli.offload_flags import OffloadFlags
from ppsim.cli.reduction_flags import ReductionFlags
from ppsim.cli.tables import about_of, results_of, table_of
from ppsim.export.trace_files import write_trace
from ppsim.files import check_files
from ppsim.simulation.memory_columns import with_columns
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace
from ppsim.variation.ensemble import Ensemble
from ppsim.variation.monte_carlo import monte_carlo

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class SimulateCommand(
    FigureFlag, OffloadFlags, ReductionFlags, JitterFlags, ConditionFlags, NetworkFlags, CostFlags, ScheduleFlags
):
    """Predict one step. Costs are of one microbatch: one set for all stages, or a file of layers to be partitioned.

    With --jitter and the like, the distribution of the step time as well, from samples. All else is of the mean costs.
    """

    forward_only: bool = False
    """Leave the backwards out, as an evaluation does."""
    engine: OptionalName = None
    """What computes the times: simpy, or compiled for the same answer sooner (default: simpy; compiled for samples)."""
    optimizer: OptionalName = None
    """Whose state to count: sgd, momentum, adam or adamw (default: none)."""
    out: OptionalFile = None
    """Write the trace: .json or .json.gz for ui.perfetto.dev, .csv as a table, any other name for ppsim.Trace.load."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Predict, sample, write and print what the flags ask for."""
        check_files(self.out)
        self.check_figure()
        schedule = self.load_schedule()
        if self.forward_only:
            schedule = schedule.forward_only()
        sampling = self.load_jitter(schedule.program)
        kinds = {kind for order in schedule.orders for kind in np.unique(order.kind).tolist()}
        stages, network = self.stage_costs(schedule.model_stages, kinds), self.load_network(schedule.ranks)
        schedule, conditions = self.offload(*self.shard(schedule, self.conditions))
        engine = "simpy" if self.engine is None else self.engine
        trace = simulate(schedule, stages, network=network, engine=engine, conditions=conditions)
        trace = with_columns(trace, receive_window=conditions.receive_window, optimizer=self.optimizer)
        ensemble = None
        if sampling is not None:
            jitter, samples, seed = sampling
            ensemble = monte_carlo(
                schedule,
                stages,
                network=network,
                jitter=jitter,
                samples=samples,
                seed=seed,
                engine=self.engine,
                conditions=conditions,
            )
        if self.out is not None:
            write_trace(trace, self.out)
        self.draw(lambda: _figure(trace, ensemble))
        if self.json:
            sampled = {} if ensemble is None else ensemble.to_dict()
            about = {name: value for name, value in sampled.items() if name not in ("engine", "conditions", "details")}
            ending.print_json({**about_of(schedule), **results_of(trace), **about})
        else:
            print(table_of(trace))
            if ensemble is not None:
                print(f"\n{_distribution(ensemble)}")


def _figure(trace: Trace, ensemble: Ensemble | None) -> go.Figure:
    """The step's timeline, with the range of each start where there are samples."""
    from ppsim.plots.timeline_figure import timeline

    name = trace.schedule.name
    return timeline({name: trace}, spreads=None if ensemble is None else {name: ensemble})


def _distribution(ensemble: Ensemble) -> str:
    """The samples in three lines of text."""
    found = "  ".join(f"{name} {value:.6g}" for name, value in ensemble.percentiles_s.items())
    return (
        f"{len(ensemble)} samples: step time (s)  {found}\n"
        f"mean {ensemble.mean_s:.6g} s (standard error {ensemble.standard_error_s:.2g}), "
        f"standard deviation {ensemble.std_s:.4g} s, mean bubble {ensemble.bubble_fraction.mean():.2%}"
    )
