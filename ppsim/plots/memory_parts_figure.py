"""Memory parts: what each rank holds at the moment when it holds the most."""

from __future__ import annotations

import html
from collections.abc import Mapping

import plotly.graph_objects as go

from ppsim.plots import style
from ppsim.plots.units import bytes_unit
from ppsim.trace.trace import Trace

# In the order of stacking: parameters and what else is there all the time first, then what comes and goes in a step.
# Gathered parameters come and go too, and lie beside the parameters.
_PARTS = {
    "parameter_bytes": ("parameters", "#6677cc"),
    "unsharded_bytes": ("gathered parameters", "#9977cc"),
    "optimizer_bytes": ("optimizer", "#999999"),
    "other_bytes": ("other, not broken down", "#ccccbb"),
    "gradient_bytes": ("gradients", "#44aa99"),
    "activation_bytes": ("activations", "#bb3d86"),
    "receive_buffer_bytes": ("receive buffers", "#ccaa33"),
    "send_buffer_bytes": ("unfinished sends", "#cc6644"),
}


def memory_parts(traces: Mapping[str, Trace], *, title: str | None = None) -> go.Figure:
    """Draw the parts of each rank's peak memory: one stacked bar for each rank and trace.

    Activations are always shown. Other parts are left out if they are unknown or 0 in every trace.

    Raises
    ------
    InputError
        If there are no traces.
    """
    chosen = style.named(traces)
    held = {name: trace.held_at_peak() for name, trace in chosen.items()}
    places = [
        (f"rank {rank}", name)
        for rank in range(max(trace.ranks for trace in chosen.values()))
        for name in chosen
        if rank < chosen[name].ranks
    ]
    totals = {
        (f"rank {rank}", name): int(sum(int(each[rank]) for each in held[name].values()))
        for name in chosen
        for rank in range(chosen[name].ranks)
    }
    largest = max(totals.values())
    unit = bytes_unit(largest)
    parts = [
        part
        for part in _PARTS
        if part == "activation_bytes" or any(part in each and each[part].any() for each in held.values())
    ]
    names, bottom = style.names_below(list(chosen), len(places))
    figure = go.Figure(layout=style.layout(height=260, title=title, bottom=bottom))
    axis = [[rank for rank, _ in places], [html.escape(name) for _, name in places]]
    for part in parts:
        label, colour = _PARTS[part]
        amounts = [
            int(held[name][part][int(rank.removeprefix("rank "))]) if part in held[name] else None
            for rank, name in places
        ]
        figure.add_trace(
            go.Bar(
                name=label,
                x=axis,
                y=[None if amount is None else amount * unit.scale for amount in amounts],
                marker={"color": colour},
                customdata=[f"{amount:,}" if amount is not None else "not known" for amount in amounts],
                hovertemplate=f"%{{x}}<br>{label}: %{{y:.4g}} {unit.name} (%{{customdata}} bytes)<extra></extra>",
            )
        )
    figure.update_layout(
        barmode="stack",
        bargap=0.3,
        showlegend=True,
        legend={"traceorder": "normal"},
        xaxis={"fixedrange": True, "dividercolor": style.GRID, **names},
        yaxis={"title": {"text": f"[{unit.name}]"}, "gridcolor": style.GRID, "rangemode": "tozero"},
    )
    figure.update_yaxes(range=[0, largest * unit.scale * 1.08 or 1], zeroline=False)
    return figure
