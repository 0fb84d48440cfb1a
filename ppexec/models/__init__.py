"""Models: a list of layers, where the microbatches come from, and the loss."""

from __future__ import annotations

from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model, refuse_what_does_not_fit, resolve_factory
from ppexec.models.model import Model

__all__ = ["Model", "initialize_layer", "load_model", "refuse_what_does_not_fit", "resolve_factory"]
