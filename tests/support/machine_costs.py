"""The costs of layers on a machine, for tests that simulate what the machine predicts."""

from __future__ import annotations

from collections.abc import Sequence

from ppsim import Execution, LayerCost, Machine
from ppsim.estimate.layer_times import LayerTable
from ppsim.estimate.work import LayerWork


def layer_costs(layers: Sequence[LayerWork], execution: Execution, machine: Machine) -> list[LayerCost]:
    """One cost for each layer."""
    seconds = LayerTable([(layer, execution) for layer in layers]).seconds(machine)
    return [
        LayerCost(
            name=layer.name,
            forward_s=float(seconds.forward[index]),
            backward_input_s=float(seconds.backward_input[index]),
            backward_weight_s=float(seconds.backward_weight[index]),
            backward_s=float(seconds.backward[index]),
            activation_bytes=layer.activation_bytes,
            weight_activation_bytes=layer.weight_activation_bytes,
            output_bytes=layer.output_bytes,
            parameter_bytes=layer.parameter_bytes,
        )
        for index, layer in enumerate(layers)
    ]
