"""Engines: the simulated clocks. Each runs a load to the times of its rows and messages."""
