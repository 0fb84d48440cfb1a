"""Plots: pictures of traces. Pure functions, each from named traces to one plotly figure.

Every function of traces takes a mapping such as `{"predicted": simulated, "measured": run}`; its names are the labels
and its sequence is the sequence in the picture. No function asks which clock made a trace, except to dash what was
simulated.
"""

from ppsim.plots.accuracy_figure import accuracy, errors
from ppsim.plots.attribution_figure import attribution
from ppsim.plots.bubble_figure import bubbles
from ppsim.plots.memory_figure import memory
from ppsim.plots.memory_parts_figure import memory_parts
from ppsim.plots.step_times_figure import step_times
from ppsim.plots.style import KIND_COLOURS
from ppsim.plots.timeline_figure import timeline

__all__ = [
    "KIND_COLOURS",
    "accuracy",
    "attribution",
    "bubbles",
    "errors",
    "memory",
    "memory_parts",
    "step_times",
    "timeline",
]
