"""Sweep: a function over a grid of configurations, on any executor, its results kept in SQLite."""
