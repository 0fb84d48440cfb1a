"""Variation: durations that differ from step to step, fitted to traces, drawn, and simulated many times."""
