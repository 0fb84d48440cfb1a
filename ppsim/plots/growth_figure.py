"""Growth figure: memory and open files of processes over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ppsim.plots.style import layout, series_colour


def growth_figure(
    seconds: Sequence[float], *, memory_bytes: Mapping[str, Sequence[float]], files: Mapping[str, Sequence[float]]
) -> go.Figure:
    """Draw memory above open files, with a line for each group of processes.

    Parameters
    ----------
    seconds : sequence of float
        When they were counted.
    memory_bytes, files : mapping
        Name -> bytes of memory, number of open files; one for each moment.
    """
    picture = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    picture.update_layout(layout(height=420, title=None, bottom=60, entries=len(memory_bytes)), overwrite=True)
    minutes = [moment / 60 for moment in seconds]
    for number, (name, values) in enumerate(memory_bytes.items()):
        line = {"color": series_colour(number)}
        picture.add_scatter(x=minutes, y=[value / 2**20 for value in values], name=name, line=line, row=1, col=1)
        picture.add_scatter(x=minutes, y=list(files[name]), name=name, line=line, showlegend=False, row=2, col=1)
    picture.update_xaxes(title_text="minutes", row=2, col=1)
    picture.update_yaxes(title_text="memory [MiB]", rangemode="tozero", row=1, col=1)
    picture.update_yaxes(title_text="open files", rangemode="tozero", row=2, col=1)
    return picture
