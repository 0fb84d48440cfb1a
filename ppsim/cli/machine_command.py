"""The command `ppsim fit-machine`: a machine's constants from measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from ppsim.cli import command
from ppsim.cli.command import OptionalFile, OptionalWhole
from ppsim.errors import InputError
from ppsim.estimate.machine import CONSTANTS, Machine, machine_names, named_machine
from ppsim.export.text_table import text_table
from ppsim.files import check_file
from ppsim.planning.machine_fit import MachineFit, fit_machine
from ppsim.planning.measured_steps import MeasuredStep, Style, read_measured_steps
from ppsim.planning.step_table import StepTable

_DEVICE_HELP = tyro.conf.arg(help=f"The device, whose peaks its vendor says: {', '.join(machine_names())}.")
_FILES_HELP = tyro.conf.arg(metavar="CSV", help="Files of measured steps, one row for each.")


@dataclass(frozen=True, kw_only=True)
class FitMachineCommand:
    """Fit a machine's constants to measured training steps of GPTs, and say how well they explain them.

    A file has the columns global_batch, micro_batch_size, hidden, heads, layers, seq, tp, dp, pp, and step_s or
    step_ms; vTrain's names of them are known too.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, _FILES_HELP]
    device: Annotated[str, _DEVICE_HELP] = "a100"
    devices_per_node: OptionalWhole = None
    """Devices that share a node (default: 8)."""
    vocabulary: int = 51_200
    """Of all models."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computed again; auto: nothing if all rows of a file then fit the memory, else all."""
    style: Style = "megatron"
    """How layers are computed: as Megatron-LM of 2022 does, or with fused attention."""
    held_back: float = 0.0
    """A share of the rows, drawn by --seed, that is not fitted but predicted."""
    seed: int = 0
    """Draws the rows that are held back."""
    out: OptionalFile = None
    """Write the machine, .json, for ppsim plan --machine."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Fit, write --out, and print."""
        if not 0 <= self.held_back < 1:
            raise InputError(f"--held-back must be a share from 0 up to below 1, got {self.held_back!r}")
        if self.out is not None:
            check_file(self.out)
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
        drawn = np.random.default_rng(self.seed).permutation(len(measured))
        kept = len(measured) - int(self.held_back * len(measured))
        fit = fit_machine([measured[index] for index in sorted(drawn[:kept])], start)
        rest = [measured[index] for index in sorted(drawn[kept:])]
        errors = {"fitted": fit.error, **({"held back": _errors(fit.machine, rest)} if rest else {})}
        about = {name: _summary(error) for name, error in errors.items()}
        if self.out is not None:
            fit.machine.save(self.out, fit={"files": [str(path) for path in self.files], **about})
        if self.json:
            constants = {name: getattr(fit.machine, name) for name in CONSTANTS}
            spread = dict(fit.machine.spread)
            command.print_json({"device": self.device, "constants": constants, "spread": spread, "errors": about})
        else:
            print(_text(fit, about))


def _errors(machine: Machine, measured: Sequence[MeasuredStep]) -> Any:
    seconds = np.array([each.seconds for each in measured])
    return StepTable([each.step for each in measured]).seconds(machine).step / seconds - 1


def _summary(error: Any) -> dict[str, float]:
    """Of errors as shares: how many, the mean of their sizes, their mean, and the largest."""
    size = np.abs(error)
    return {
        "steps": len(error),
        "mean_error": float(size.mean()),
        "mean_signed_error": float(error.mean()),
        "worst_error": float(size.max()),
    }


def _text(fit: MachineFit, about: dict[str, dict[str, float]]) -> str:
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
        f"{name}: {int(found['steps'])} steps, mean error {found['mean_error']:.1%}, "
        f"mean of signed errors {found['mean_signed_error']:+.1%}, worst {found['worst_error']:.1%}"
        for name, found in about.items()
    ]
    return "\n".join([text_table(rows), "", *lines])
