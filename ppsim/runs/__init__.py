"""Runs: steps that other frameworks measured, read into traces, and what they say of costs."""
