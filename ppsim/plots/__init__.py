"""Plots: pictures of traces. Pure functions, each from named traces to one plotly figure.

Every function of traces takes a mapping such as `{"predicted": simulated, "measured": run}`; its names are the labels
and its sequence is the sequence in the picture. No function asks which clock made a trace, except to dash what was
simulated.
"""
