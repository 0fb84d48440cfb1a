"""Advice: which schedule would make a measured job's step shorter, under its memory, and how to load it."""
