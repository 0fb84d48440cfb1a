"""The command `ppsim fit-machine`: a machine's constants from measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from ppsim.cli import ending
from ppsim.cli.command import OptionalFile, OptionalWhole
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.estimate.machine import CONSTANTS
from ppsim.estimate.named_machines import machine_names, named_machine
from ppsim.export.text_table import text_table
from ppsim.files import check_files
from ppsim.planning.machine_fit import MachineFit, Numbers, error_summary, fit_machine, prediction_errors
from ppsim.planning.measured_steps import MeasuredStep, Style, drawn_order, read_measured_steps

_DEVICE_HELP = tyro.conf.arg(help=f"The device, whose peaks its vendor says: {', '.join(machine_names())}.")
_FILES_HELP = tyro.conf.arg(metavar="CSV", help="Files of measured steps, one row per step.")


@dataclass(frozen=True, kw_only=True)
class FitMachineCommand:
    """Fit a machine's constants to measured training steps of GPTs, and say how well they explain them.

    A file has the columns global_batch, micro_batch_size, hidden, heads, layers, seq, tp, dp, pp, and step_s or
    step_ms. The column names of vTrain, a simulator with published measurements, are accepted too.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, _FILES_HELP]
    device: Essential[Annotated[str, _DEVICE_HELP]] = "a100"
    devices_per_node: OptionalWhole = None
    """Devices that share a node (default: 8)."""
    vocabulary: int = 51_200
    """Vocabulary size of all models in the files."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computed again, if a file has no column recompute. auto: none if all rows of a file then fit
    the device's memory, else full for all."""
    style: Style = "megatron"
    """How layers are computed. megatron: unfused attention and a float32 loss, as Megatron-LM of 2022; plain: fused
    attention."""
    held_back: float = 0.0
    """The share of the rows, drawn by --seed and rounded down, that is not fitted but predicted."""
    seed: int = 0
    """Draws the rows that are held back."""
    by_shape: bool = True
    """Fit an extra factor for each layer shape that occurs in three rows or more."""
    out: Essential[OptionalFile] = None
    """Write the machine, .json, for ppsim plan --machine."""
    json: Essential[bool] = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Fit, write --out, and print."""
        if not 0 <= self.held_back < 1:
            raise InputError(f"--held-back must be a share from 0 up to below 1, got {self.held_back!r}")
        check_files(self.out)
        # The fit starts from default constants, not from those that were fitted to other steps.
        start = named_machine(self.device, devices_per_node=self.devices_per_node, fitted=False)
        measured = [
            each
            for path in self.files
            for each in read_measured_steps(
                path,
                vocabulary=self.vocabulary,
                recompute=self.recompute,
                style=self.style,
                memory_bytes=start.memory_bytes,
            )
        ]
        drawn = drawn_order(len(measured), self.seed)
        kept = len(measured) - int(self.held_back * len(measured))
        fitted, rest = ([measured[index] for index in sorted(part)] for part in (drawn[:kept], drawn[kept:]))
        fit = fit_machine(fitted, start, by_shape=self.by_shape)
        about = {"fitted": _errors_and_worst(fitted, fit.error)}
        if rest:
            about["held back"] = _errors_and_worst(rest, prediction_errors(rest, fit.machine))
        if self.out is not None:
            fit.machine.save(self.out, fit={"files": [str(path) for path in self.files], **about})
        if self.json:
            constants = {name: getattr(fit.machine, name) for name in CONSTANTS}
            spread = dict(fit.machine.spread)
            factors = dict(fit.machine.layer_factors)
            ending.print_json(
                {
                    "device": self.device,
                    "constants": constants,
                    "spread": spread,
                    "layer_factors": factors,
                    "errors": about,
                }
            )
        else:
            print(_text(fit, about))


def _errors_and_worst(measured: Sequence[MeasuredStep], errors: Numbers) -> dict[str, Any]:
    return {**error_summary(errors), "worst_place": measured[int(np.abs(errors).argmax())].place}


def _text(fit: MachineFit, about: dict[str, dict[str, Any]]) -> str:
    rows = [
        {
            "constant": name,
            "value": f"{getattr(fit.machine, name):.3g}",
            "spread": f"{fit.machine.spread[name]:.0%}",
            "meaning": constant.meaning,
        }
        for name, constant in CONSTANTS.items()
    ]
    lines = [
        f"{name}: {found['steps']} steps, mean absolute error {found['mean_error']:.1%}, "
        f"bias {found['mean_signed_error']:+.1%}, "
        f"worst {found['worst_error']:.1%} ({found['worst_place']})"
        for name, found in about.items()
    ]
    factors = list(fit.machine.layer_factors.values())
    if factors:
        lines.append(
            f"{len(factors)} shapes of layers, in three steps or more each, have factors of their own, "
            f"from {min(factors):.2f} to {max(factors):.2f}"
        )
    return "\n".join([text_table(rows), "", *lines])
