"""Simulation: a schedule with costs played on a simulated clock. Theory has the closed forms to hold it against."""
