"""Ways: what `plot()` and `_repr_html_` of each kind of value call. Figures are imported when the first is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppsim.order_search.search import SearchResult
from ppsim.runs.run import Run
from ppsim.schedule.schedule import Schedule
from ppsim.shown import show_with
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go


def hand_in() -> None:
    """Let schedules, traces, search results and runs show themselves."""
    show_with(
        trace_figure=_trace_figure,
        schedule_figure=_schedule_figure,
        schedule_html=_schedule_html,
        trace_html=_trace_html,
        search_html=_search_html,
        run_html=_run_html,
    )


def _trace_figure(trace: Trace, *, messages: bool, critical_path: bool) -> go.Figure:
    from ppsim.plots.timeline_figure import timeline

    return timeline({trace.schedule.name: trace}, messages=messages, critical_path=critical_path)


def _schedule_figure(schedule: Schedule, *, critical_path: bool) -> go.Figure:
    from ppsim.export.staircase import unit_trace
    from ppsim.plots.timeline_figure import timeline

    return timeline({f"{schedule}, F = I = W = 1": unit_trace(schedule)}, critical_path=critical_path)


def _schedule_html(schedule: Schedule) -> str:
    from ppsim.notebook import html

    return html.of_schedule(schedule)


def _trace_html(trace: Trace) -> str:
    from ppsim.notebook import html

    return html.of_trace(trace)


def _search_html(found: SearchResult) -> str:
    from ppsim.notebook import html

    return html.of_search(found)


def _run_html(run: Run) -> str:
    from ppsim.notebook import html

    return html.of_run(run)
