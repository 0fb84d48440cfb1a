"""Memory: the activation bytes that each rank holds over time."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.plots import style
from ppsim.plots.units import Unit, bytes_unit, time_unit
from ppsim.trace.trace import Trace, known

_PANEL_PX = 120
_TITLE_PX = 34


def memory(traces: Mapping[str, Trace], *, title: str | None = None) -> go.Figure:
    """Draw activation bytes over time: a panel for each rank, a line for each trace.

    All panels have the same axes, and each trace starts at 0. A level holds from the moment an action takes effect
    (`Trace.effect_s`). The dot marks where the peak is first reached. Beside measured traces, simulated ones are dashed
    and drawn on top. With up to four traces each panel's title gives their peaks. A trace that does not know its
    activations has no line.

    Raises
    ------
    InputError
        If there are no traces.
    """
    chosen = style.named(traces)
    ranks = max(trace.ranks for trace in chosen.values())
    columns = 1 if ranks == 1 else 2 if ranks <= 8 else 4
    rows = -(-ranks // columns)
    longest_s = max(trace.makespan_s for trace in chosen.values())
    peaks = [each.peak_activation_bytes for each in chosen.values()]
    largest = max((int(each.max()) for each in peaks if each is not None), default=0)
    time, size = time_unit(longest_s), bytes_unit(largest)
    height = rows * (_PANEL_PX + _TITLE_PX)

    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03,
        vertical_spacing=_TITLE_PX / height if rows > 1 else 0,
        subplot_titles=[_panel_title(chosen, rank, size) for rank in range(ranks)],
    )
    figure.update_layout(style.layout(height=height, title=title, top=58, entries=len(chosen)))
    figure.update_annotations(font={"size": 12}, xanchor="left", yanchor="bottom")
    peak = largest * size.scale or 1.0
    for rank in range(ranks):
        cell = {"row": rank // columns + 1, "col": rank % columns + 1}
        # A panel's title starts where the panel starts.
        figure.layout.annotations[rank].x = figure.get_subplot(**cell).xaxis.domain[0]
        for index, name in _drawing_order(chosen):
            if rank < chosen[name].ranks and chosen[name].activation_bytes is not None:
                figure.add_traces(_lines(chosen, index, name, rank, time, size), rows=cell["row"], cols=cell["col"])
    figure.update_xaxes(range=[0, longest_s * time.scale * 1.01 or 1], gridcolor=style.GRID, zeroline=False)
    figure.update_yaxes(range=[-0.03 * peak, 1.12 * peak], gridcolor=style.GRID, zeroline=False)
    figure.update_yaxes(nticks=5)
    figure.update_xaxes(
        row=rows, title={"text": f"time from the step's start [{time.name}]", "standoff": style.AXIS_TITLE_GAP_PX}
    )
    figure.update_yaxes(col=1, title={"text": f"[{size.name}]"})
    return figure


def _drawing_order(traces: dict[str, Trace]) -> list[tuple[int, str]]:
    """Indices and names, simulated traces last: they are drawn on top."""
    return sorted(enumerate(traces), key=lambda item: traces[item[1]].clock == "simulated")


def _panel_title(traces: dict[str, Trace], rank: int, size: Unit) -> str:
    """The rank, and each trace's peak in the colour of its line."""
    text = f"<b>rank {rank}</b>"
    if len(traces) > style.ENTRIES_ABOVE:
        return text
    peaks = [
        f'<span style="color:{style.series_colour(index)}">{_peak_text(trace, rank, size)}</span>'
        for index, trace in enumerate(traces.values())
        if rank < trace.ranks
    ]
    return f"{text}   peak {' / '.join(peaks)} {size.name}"


def _peak_text(trace: Trace, rank: int, size: Unit) -> str:
    peaks = trace.peak_activation_bytes
    return "not known" if peaks is None else f"{peaks[rank] * size.scale:.4g}"


def _lines(
    traces: dict[str, Trace], index: int, name: str, rank: int, time: Unit, size: Unit
) -> tuple[go.Scatter, go.Scatter]:
    """A rank's level as a step line, and the dot at its peak."""
    times_s, levels = _levels(traces[name], rank)
    x, y = times_s * time.scale, levels * size.scale
    among_measured = any(trace.clock != "simulated" for trace in traces.values())
    dashed = among_measured and traces[name].clock == "simulated"
    colour = style.series_colour(index)
    again = ("solid", "dot", "dashdot")[min(style.series_round(index), 2)]
    top = int(np.argmax(levels))
    label = html.escape(name)
    tip = f"{label}, rank {rank}<br>%{{y:.4g}} {size.name} from %{{x:.4g}} {time.name} on<extra></extra>"
    line = go.Scatter(
        name=label,
        legendgroup=name,
        legendrank=index + 1,
        showlegend=rank == 0,
        x=x,
        y=y,
        mode="lines",
        line={"shape": "hv", "color": colour, "width": 1.8, "dash": "4px,3px" if dashed else again},
        hovertemplate=tip,
    )
    peak = go.Scatter(
        name=f"{label}: peak",
        legendgroup=name,
        showlegend=False,
        x=x[top : top + 1],
        y=y[top : top + 1],
        mode="markers",
        marker={
            "color": colour,
            "size": 8,
            "symbol": "circle-open" if dashed else "circle",
            "line": {"width": 2, "color": colour},
        },
        hovertemplate="peak: " + tip,
    )
    return line, peak


def _levels(trace: Trace, rank: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Times from the step's start and the bytes held from then on, from 0 to the makespan."""
    rows = trace.program.rows_of(rank)
    inside = slice(rows.start, rows.stop)
    effect_s = trace.effect_s[inside] - trace.start_s.min()
    levels = known(trace.activation_bytes)[inside].astype(np.float64)
    last = levels[-1:] if len(levels) else np.zeros(1)
    return np.concatenate([[0.0], effect_s, [trace.makespan_s]]), np.concatenate([[0.0], levels, last])
