"""Measure: what steps, layers and messages take on this machine, and what is kept in memory."""
