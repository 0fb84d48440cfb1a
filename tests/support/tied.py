"""Tied: whether a model's gradients add up over stages."""

from __future__ import annotations

from ppexec import RunConfig
from ppexec.models.load import load_model
from ppexec.models.ties import tied_over_stages


def is_tied_over_stages(config: RunConfig) -> bool:
    """Whether a gradient is a sum over stages, which one process adds up in another order."""
    return bool(tied_over_stages(load_model(config).tied, config.stage_of_layers))
