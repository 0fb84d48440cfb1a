"""The command line `ppexec`: run, verify, profile and train."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ppexec
from ppexec.api import profile_with_stages
from ppexec.config.config import RunConfig
from ppexec.workers.session_workers import under_torchrun
from ppsim import save_costs
from ppsim.cli import command, ending
from ppsim.cli.command import OptionalFile, OptionalFolder
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.export.text_table import text_table
from ppsim.export.trace_files import write_trace
from ppsim.files import check_files, write_text
from ppsim.trace.trace import known

_DESCRIPTION = "Run a pipeline schedule for real, measure it, and prove its gradients."


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command writes and prints."""

    out: Essential[OptionalFile] = None
    """File to write. run: the trace, .json or .json.gz for Perfetto, .csv as a table, else for ppsim.Trace.load;
    profile: the costs, .json or .csv; verify and train: the report, as JSON."""
    json: Essential[bool] = False
    """Print one JSON object and nothing else on standard output."""


@dataclass(frozen=True, kw_only=True)
class Run(Output, RunConfig):
    """Run and time a schedule; shows the median step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(self.out)

    def execute(self) -> None:
        """Run, then write and print the trace."""
        trace = ppexec.run(self)
        if not _speaks():
            return
        if self.out:
            write_trace(trace, self.out)
        times_s = sorted(trace.details["step_times_s"])
        document = {
            "step_times_s": trace.details["step_times_s"],
            "makespan_s": trace.makespan_s,
            "bubble_fraction": trace.bubble_fraction,
            "bubble_s": trace.bubble_s,
            "rank_time_s": trace.rank_time_s,
            "peak_activation_bytes": trace.peak_activation_bytes,
            "memory": trace.memory.to_dict(),
            "config": trace.details["config"],
            "environment": trace.details["environment"],
        }
        lines = [
            self._title,
            f"median step      {trace.makespan_s * 1e3:.3f} ms ({len(times_s)} steps, "
            f"{times_s[0] * 1e3:.3f} to {times_s[-1] * 1e3:.3f} ms)",
            f"bubble fraction  {trace.bubble_fraction:.4f}",
            "",
            text_table(
                [
                    {
                        "rank": str(rank),
                        "bubble (ms)": f"{trace.bubble_s[rank] * 1e3:.3f}",
                        "rank time (ms)": f"{trace.rank_time_s[rank] * 1e3:.3f}",
                        "peak activations": f"{known(trace.peak_activation_bytes)[rank] / 2**20:.2f} MiB",
                    }
                    for rank in range(trace.ranks)
                ]
            ),
        ]
        self._print(document, lines)

    @property
    def _title(self) -> str:
        """The schedule that is shown, and whose it is where replicas differ."""
        counts = self.microbatches_by_replica
        if len(set(counts)) == 1:
            return str(self.pipeline)
        return f"{self.pipeline} (replica {self.longest_replica} of those with {', '.join(map(str, counts))})"

    def _write_json(self, document: dict[str, Any]) -> None:
        if self.out:
            write_text(self.out, json.dumps(document, indent=1) + "\n")

    def _print(self, document: dict[str, Any], lines: Sequence[str]) -> None:
        if self.json:
            ending.print_json(document)
        else:
            print("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Verify(Run):
    """Compare outputs and gradients with one process without a pipeline; exit code 1 if they differ."""

    def execute(self) -> None:
        """Verify, then write and print the report. Raises SystemExit(1) if it is not passed."""
        report = ppexec.verify(self)
        if _speaks():
            self._write_json(report.to_dict())
            verdict = "bit-equal" if report.gradients_bit_equal else "equal" if report.gradients_equal else "DIFFERENT"
            outputs = "bit-equal" if report.outputs_bit_equal else f"different by {report.max_output_diff:.3e}"
            self._print(
                report.to_dict(),
                [
                    self._title,
                    f"outputs    {outputs}",
                    f"gradients  {'not computed (forward only)' if self.forward_only else verdict}",
                    f"compared   {report.compared} tensors with one process without a pipeline",
                    *([f"first difference: {report.first_difference}"] if report.first_difference else []),
                ],
            )
        if not report.passed:
            raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class Profile(Run):
    """Measure every layer's cost for one microbatch, on as many processes as the run has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix.lower() not in (".json", ".csv"):
            raise InputError(f"cannot write {self.out}: cost files end in .json or .csv")

    def execute(self) -> None:
        """Profile, then write and print the costs."""
        profile = profile_with_stages(self)
        if not _speaks():
            return
        if self.out:
            save_costs(profile.layers, self.out, environment=profile.environment)
        rows = [
            {
                "layer": layer.name,
                "F (ms)": f"{layer.forward_s * 1e3:.3f}",
                "B (ms)": f"{layer.full_backward_s * 1e3:.3f}",
                "I (ms)": f"{layer.backward_input_s * 1e3:.3f}",
                "activations": f"{layer.activation_bytes / 2**20:.2f} MiB",
                "parameters": f"{layer.parameter_bytes / 2**20:.2f} MiB",
            }
            for layer in profile.layers
        ]
        document = {
            "layers": [asdict(layer) for layer in profile.layers],
            "stages": [asdict(stage) for stage in profile.stages],
            "environment": profile.environment,
        }
        self._print(document, [text_table(rows)])


@dataclass(frozen=True, kw_only=True)
class Train(Run):
    """Train by --steps optimizer steps (AdamW); prints each one's loss."""

    save: OptionalFolder = None
    """Directory for a checkpoint after the last step."""
    resume: OptionalFolder = None
    """Checkpoint to go on from, saved on any mesh."""

    def execute(self) -> None:
        """Train, then write and print the losses."""
        report = ppexec.train(self, save=self.save, resume=self.resume)
        if not _speaks():
            return
        self._write_json(report.to_dict())
        curves = zip(report.steps, report.losses, report.gradient_norms, report.learning_rates, strict=True)
        held_out = dict(zip(report.evaluated, report.held_out_losses, strict=True))
        lines = [
            text_table(
                [
                    {
                        "step": str(step),
                        "loss": f"{loss:.6f}",
                        "gradient norm": f"{norm:.4g}",
                        "learning rate": f"{rate:.4g}",
                        **({"update": "skipped"} if step in report.skipped else {}),
                        **({"held-out loss": f"{held_out[step]:.6f}"} if step in held_out else {}),
                    }
                    for step, loss, norm, rate in curves
                ]
            )
        ]
        self._print(report.to_dict(), [*lines, *([f"saved to {report.checkpoint}"] if report.checkpoint else [])])


def _speaks() -> bool:
    """Whether this process writes and prints: under torchrun only the first does."""
    if not under_torchrun():
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0


def save_partial_trace(error: ppexec.WorkerError, beside: Path | None) -> None:
    """Save what the ranks had done of a step that did not end, and add to the error where it is.

    Parameters
    ----------
    error : WorkerError
        What ended the run.
    beside : Path, optional
        The file or directory that the command would have written; the working directory if not given.
    """
    if error.partial_trace is None:
        return
    name = f"partial-trace-{os.getpid()}.json"
    path = Path(name) if beside is None else beside / name if beside.is_dir() else beside.with_suffix(".partial.json")
    try:
        error.partial_trace.save(path)
    except OSError as failure:
        said = f"its partial trace could not be written to {path}: {failure.strerror or failure}"
    else:
        said = f"what all ranks did is in {path}, for ui.perfetto.dev"
    error.details = "\n".join(filter(None, [error.details, said]))


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line on standard error; takes the place of `warnings.showwarning`."""
    print(f"warning: {message}", file=sys.stderr)


COMMANDS: dict[str, type[Run]] = {"run": Run, "verify": Verify, "profile": Profile, "train": Train}

# What one wants, and the command that does it.
EXAMPLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "verify": (
            "prove a schedule's gradients",
            "ppexec verify --schedule zb-h1 --ranks 2 --microbatches 4 --hidden 64",
        ),
        "run": (
            "run and time a schedule",
            "ppexec run --schedule 1f1b --ranks 2 --microbatches 8 --hidden 256 --out step.trace",
        ),
        "profile": ("measure layer costs", "ppexec profile --layers 8 --hidden 256 --out costs.json"),
        "train": (
            "train a GPT on a pipeline",
            "ppexec train --model gpt --layers 4 --hidden 64 --seq 32 --schedule interleaved-1f1b --ranks 2 --steps 5",
        ),
    }
)


def main(args: Sequence[str] | None = None) -> int:
    """Run `ppexec`.

    Parameters
    ----------
    args : sequence of str, optional
        Words of the command line; those of this process unless given.

    Returns
    -------
    int
        The exit code: 0, 1 if gradients differ or a worker died, 2 for bad input.
    """

    def work() -> None:
        warnings.showwarning = show_warning
        words = list(sys.argv[1:] if args is None else args)
        if not words:
            print(command.welcome(_DESCRIPTION, EXAMPLES, prog="ppexec", first=("verify", "run")))
            return
        lines = {name: line for name, (_, line) in EXAMPLES.items()}
        chosen = command.parse(COMMANDS, prog="ppexec", description=_DESCRIPTION, examples=lines, args=words)
        try:
            chosen.execute()
        except ppexec.WorkerError as error:
            save_partial_trace(error, chosen.out)
            raise

    return ending.run(work, prog="ppexec", args=args)


if __name__ == "__main__":
    sys.exit(main())
