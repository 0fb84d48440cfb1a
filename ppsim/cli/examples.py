"""Examples: a first use of each command, shown by `ppsim` alone and in each command's help."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# What one wants -> the command that does it. Later lines use files that earlier ones write.
EXAMPLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "schedule": ("see a schedule", "ppsim schedule --schedule 1f1b --ranks 4 --microbatches 8"),
        "explore": ("change it and look", "ppsim explore --schedule zb-h1 --ranks 4 --microbatches 8"),
        "simulate": (
            "predict a step",
            "ppsim simulate --schedule zb-h1 --ranks 4 --microbatches 8 --forward-s 0.01 --backward-input-s 0.01 "
            "--backward-weight-s 0.01 --activation-bytes 1000000 --latency-s 1e-5 --out step.trace",
        ),
        "attribute": ("see what ranks wait for", "ppsim attribute step.trace"),
        "compare": (
            "compare with a measured step",
            "ppsim compare step.trace step.trace",
        ),
        "search": (
            "find an order under a memory limit",
            "ppsim search --ranks 4 --microbatches 8 --forward-s 1 --backward-input-s 1 --backward-weight-s 1 "
            "--activation-bytes 10 --memory-limit-bytes 40 --csv order.csv",
        ),
        "estimate": (
            "get costs from a model's shapes",
            "ppsim estimate --layers 24 --hidden 2048 --heads 16 --device h100 --out costs.json",
        ),
        "plan": (
            "plan a training",
            "ppsim plan --layers 24 --hidden 2048 --heads 16 --device h100 --devices 16 --global-batch 64",
        ),
        "import": ("read another framework's run", "ppsim import run --out steps"),
        "advise": ("improve a measured run", "ppsim advise steps"),
        "fit-machine": ("fit a machine to measured steps", "ppsim fit-machine steps.csv --device a100"),
    }
)
