"""Trace: when everything in a step happened, simulated or measured; its metrics, its tables and its memory columns."""
