"""Recompute: what layers cost if each keeps its input alone and is computed anew for its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ppsim.checks import checked
from ppsim.costs.stage_cost import LayerCost


@checked
def recompute_layers(layers: Sequence[LayerCost], *, input_bytes: int = 0) -> list[LayerCost]:
    """The same chain of layers with full activation recomputation (Chen et al., 2016).

    B and I get longer by the layer's forward; W does not, since what it needs is kept at I, so that
    `weight_activation_bytes` stay. `activation_bytes` become the layer's input and output; a stage of k such layers
    holds k inputs and an output.

    input_bytes: of the first layer's input; every other layer's input is the output of the one before. Raises CostError
    for an input_bytes that is no whole number of bytes.
    """
    result, before = [], input_bytes
    for layer in layers:
        backward_s = None if layer.backward_s is None else layer.backward_s + layer.forward_s
        again_s = layer.forward_communication_s
        backward_communication_s = (
            None if layer.backward_communication_s is None else layer.backward_communication_s + again_s
        )
        result.append(
            replace(
                layer,
                backward_input_s=layer.backward_input_s + layer.forward_s,
                backward_s=backward_s,
                backward_input_communication_s=layer.backward_input_communication_s + again_s,
                backward_communication_s=backward_communication_s,
                activation_bytes=before + layer.output_bytes,
            )
        )
        before = layer.output_bytes
    return result
