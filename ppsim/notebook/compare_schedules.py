"""Compare schedules: several on one time axis and in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppsim.checks import checked
from ppsim.costs.sharing import share_cost
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.network.network import Network
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleComparison:
    """Steps of several schedules.

    Parameters
    ----------
    traces : mapping from a name to a Trace
        In the sequence in which they are shown.
    """

    traces: Mapping[str, Trace]

    def plot(self, *, critical_path: bool = False) -> go.Figure:
        """The timelines one above the other on one time axis."""
        from ppsim.plots.timeline_figure import timeline

        return timeline(self.traces, critical_path=critical_path)

    def plot_small(self, *, columns: int = 3) -> go.Figure:
        """Each step in a small panel, `columns` side by side, on one scale of time."""
        from ppsim.plots.small_multiples_figure import small_multiples

        return small_multiples(self.traces, columns=columns)

    def plot_memory(self) -> go.Figure:
        """The activation bytes of each rank over time. Raises InputError if a trace does not know them."""
        from ppsim.plots.memory_figure import memory

        return memory(self.traces)

    def to_frame(self) -> pandas.DataFrame:
        """A row for each schedule.

        Returns
        -------
        pandas.DataFrame
            Index schedule; columns makespan_s, relative_makespan (to the shortest), bubble_fraction, rank_time_s (the
            longest) and peak_activation_bytes (of the rank that holds the most; missing where not known).
        """
        import pandas

        shortest_s = min(trace.makespan_s for trace in self.traces.values())
        rows = [
            {
                "schedule": name,
                "makespan_s": trace.makespan_s,
                "relative_makespan": trace.makespan_s / shortest_s if shortest_s > 0 else 1.0,
                "bubble_fraction": trace.bubble_fraction,
                "rank_time_s": float(trace.rank_time_s.max()),
                "peak_activation_bytes": None
                if trace.peak_activation_bytes is None
                else int(trace.peak_activation_bytes.max()),
            }
            for name, trace in self.traces.items()
        ]
        return pandas.DataFrame(rows).set_index("schedule")

    def _repr_html_(self) -> str:
        from ppsim.notebook import html
        from ppsim.plots.units import bytes_text, time_unit

        unit = time_unit(max(trace.makespan_s for trace in self.traces.values()))
        return html.table(
            [
                {
                    "schedule": name,
                    "step": unit.text(trace.makespan_s),
                    "bubble": f"{trace.bubble_fraction:.1%}",
                    "longest rank": unit.text(float(trace.rank_time_s.max())),
                    "peak activations": None
                    if trace.peak_activation_bytes is None
                    else bytes_text(int(trace.peak_activation_bytes.max())),
                }
                for name, trace in self.traces.items()
            ]
        )


_UNIT_COST = StageCost(
    forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=2**20, weight_activation_bytes=2**19
)


@checked
def compare_schedules(
    schedules: Sequence[Schedule | Trace],
    *,
    rank_cost: StageCost | None = None,
    network: Network | None = None,
    **options: Any,
) -> ScheduleComparison:
    """Put several schedules on one time axis and into one table.

    Parameters
    ----------
    schedules : sequence of Schedule or Trace
        Schedules are simulated, traces are taken as they are: with costs that differ from stage to stage, or measured.
    rank_cost : StageCost, optional
        What a microbatch costs on a rank, shared evenly by the rank's stages, so that schedules with one and with
        several stages on each rank are of one model. By default F = I = W = 1 s, and a microbatch holds 1 MiB on a rank
        until B, or half of that from I to W.
    network : Network, optional
        The links between ranks. Without it messages take no time.
    **options
        Of `ppsim.simulate`.

    Returns
    -------
    ScheduleComparison
        Its `plot()` is a figure, its `to_frame()` a table; a notebook shows the table.

    Raises
    ------
    InputError
        If there is no schedule. Also what `simulate` raises.

    Examples
    --------
    >>> import ppsim
    >>> names = ["1f1b", "interleaved-1f1b", "zb-h1"]
    >>> found = compare_schedules([ppsim.build_schedule(name, ranks=4, microbatches=8) for name in names])
    >>> found.to_frame()["makespan_s"].to_dict()
    {'1f1b': 33.0, 'interleaved-1f1b': 28.5, 'zb-h1': 27.0}
    """
    if not schedules:
        raise InputError("there is no schedule to compare: give one or more")
    cost = rank_cost or _UNIT_COST
    traces: dict[str, Trace] = {}
    for each in schedules:
        if isinstance(each, Trace):
            trace, name = each, each.schedule.name
        else:
            stages = share_cost(cost, each.placement, each.copies)
            trace, name = simulate(each, stages, network=network, **options), each.name
        traces[_free_name(name, traces)] = trace
    return ScheduleComparison(traces=traces)


def _free_name(name: str, taken: Mapping[str, Trace]) -> str:
    """The name, with a number behind it if it is taken."""
    number, found = 2, name
    while found in taken:
        number, found = number + 1, f"{name} ({number})"
    return found
