"""Costs: what a stage or a layer takes and holds; how layers are cut into stages, and what recomputing them changes."""
