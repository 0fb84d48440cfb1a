"""Random stages: costs that differ from stage to stage."""

from __future__ import annotations

import numpy as np

from ppsim import StageCost


def random_stages(count: int, seed: int, *, fused: bool = False) -> list[StageCost]:
    random = np.random.default_rng(seed)
    stages = []
    for forward, grad_input, weight, share in random.uniform(0.4, 1.6, (count, 4)):
        activation = int(random.integers(4, 13))
        stages.append(
            StageCost(
                forward_s=forward,
                backward_input_s=grad_input,
                backward_weight_s=weight,
                backward_s=(grad_input + weight) * (0.6 + share / 4) if fused else None,
                activation_bytes=activation,
                weight_activation_bytes=int(random.integers(0, activation + 2)),
                output_bytes=int(random.integers(1, 4)),
            )
        )
    return stages
