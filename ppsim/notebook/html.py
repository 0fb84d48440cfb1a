"""HTML: what a notebook shows of schedules, traces, search results and runs. All text is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping

from ppsim.errors import ScheduleError
from ppsim.export.staircase import unit_trace
from ppsim.export.svg_timeline import MOST_ROWS, svg_timeline
from ppsim.export.table_cells import Table, cell_text, columns_of
from ppsim.order_search.search import SearchResult
from ppsim.plots.units import bytes_text, time_unit
from ppsim.runs.run import Run
from ppsim.schedule.schedule import Schedule
from ppsim.trace.trace import Trace

_MOST_LINES = 24


def of_schedule(schedule: Schedule) -> str:
    """Name and sizes, and the picture with F = I = W = 1 and free messages if the schedule can run."""
    head = f"<p><b>{html.escape(str(schedule))}</b></p>"
    if sum(len(order.stage) for order in schedule.orders) > MOST_ROWS:
        return head
    try:
        trace = unit_trace(schedule)
    except ScheduleError as error:  # a schedule that is not checked yet may still be shown
        return f"{head}<p>{html.escape(str(error))}</p>"
    facts = f"With F = I = W = 1 and free messages: step {trace.makespan_s:g}, bubble {trace.bubble_fraction:.1%}."
    return f"{head}{svg_timeline(trace)}<p>{facts}</p>"


def of_trace(trace: Trace) -> str:
    """What `plot()` shows, small, and a line for each rank."""
    unit = time_unit(trace.step_s)
    peaks = trace.peak_activation_bytes
    line = f"{trace.clock}, step {unit.text(trace.makespan_s)}, bubble {trace.bubble_fraction:.1%}"
    ranks: list[Mapping[str, object]] = [
        {
            "rank": rank,
            "rank time": unit.text(float(trace.rank_time_s[rank])),
            "compute": unit.text(float(trace.compute_s[rank])),
            "bubble": unit.text(float(trace.bubble_s[rank])),
            "peak activations": None if peaks is None else bytes_text(int(peaks[rank])),
        }
        for rank in range(min(trace.ranks, _MOST_LINES))
    ]
    picture = svg_timeline(trace) if len(trace.start_s) <= MOST_ROWS else ""
    head = f"<p><b>{html.escape(str(trace.schedule))}</b><br>{html.escape(line)}</p>"
    return head + picture + table(ranks) + _rest(trace.ranks, "ranks")


def of_search(found: SearchResult) -> str:
    """How far the result can be from the best, and its trace."""
    unit = time_unit(found.lower_bound_s)
    return f"<p>No order is below {unit.text(found.lower_bound_s)}.</p>{of_trace(found.trace)}"


def of_run(run: Run) -> str:
    """A line for each step."""
    rows: list[Mapping[str, object]] = [
        {
            "step": step,
            "makespan": time_unit(trace.makespan_s).text(trace.makespan_s),
            "bubble": f"{trace.bubble_fraction:.1%}",
        }
        for step, trace in list(zip(run.steps, run.traces, strict=True))[:_MOST_LINES]
    ]
    head = f"<p><b>{html.escape(str(run.schedule))}</b><br>{html.escape(run.source)}</p>"
    return head + table(rows) + _rest(len(run.steps), "steps")


def table(rows: Table) -> str:
    """Rows as an HTML table; columns of amounts are right-aligned."""
    columns = columns_of(rows)
    align = {name: ' style="text-align:right"' if is_amount else "" for name, is_amount in columns.items()}
    head = "".join(f"<th{align[name]}>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{align[name]}>{html.escape(cell_text(row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _rest(count: int, what: str) -> str:
    return f"<p>and {count - _MOST_LINES} more {what}</p>" if count > _MOST_LINES else ""
