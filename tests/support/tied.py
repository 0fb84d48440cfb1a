"""Tied: whether a model's gradients add up over stages."""

from __future__ import annotations

from ppexec import RunConfig
from ppexec.models.load import load_model
from ppexec.models.ties import places_by_stage


def is_tied_over_stages(config: RunConfig) -> bool:
    """Whether a gradient is a sum over stages, which one process adds up in another order."""
    return any(len(places_by_stage(places, config.stage_of_layers)) > 1 for places in load_model(config).tied)
