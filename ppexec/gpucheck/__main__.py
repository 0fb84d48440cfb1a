"""`python -m ppexec.gpucheck [--json] [--out FILE] [--only PART ...]`: the GPU check on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppexec.cli import show_warning
from ppexec.gpucheck.parts import PARTS, Part
from ppexec.machine.environment import describe_environment
from ppexec.workers.pool import WorkerPool
from ppsim.cli import command, ending
from ppsim.errors import InputError
from ppsim.files import write_text

_MOST_FAILURES = 2  # cases of a part; each may take as long as its time-out
_IN_JSON_ALONE = (
    "what",
    "passed",
    "calibration",
    "stages",
    "quartiles_us",
    "step_times_ms",
    "details",
    "durations",
    "host_delay",
    "multiprocessors",
)


@dataclass(frozen=True, kw_only=True)
class GpuCheck:
    """Check on this machine's GPUs what only a GPU can show: equality, NCCL, memory, overhead, step times."""

    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    out: Path | None = None
    """File for the JSON object."""
    only: tuple[str, ...] = ()
    """Parts to run, by name; all unless given."""

    def execute(self) -> int:
        """Run the parts; 0 if all passed, 1 if some did not. Raises InputError without a GPU."""
        if not torch.cuda.is_available():
            raise InputError(
                f"PyTorch {torch.__version__} sees no NVIDIA GPU: run this where there is one, with a PyTorch for CUDA"
            )
        known = [part.name for part in PARTS]
        for name in self.only:
            if name not in known:
                raise InputError(f"unknown part {name!r}: known are {', '.join(known)}")
        document: dict[str, Any] = {"machine": describe_machine(), "parts": {}}
        for part in PARTS:
            if not self.only or part.name in self.only:
                document["parts"][part.name] = run_part(part)
                if self.out:  # after every part: a check that is cut off leaves what it knows
                    write_text(self.out, json.dumps(document, indent=1, default=str) + "\n")
        if self.json:
            ending.print_json(document)
        else:
            print("\n".join(table(document)))
        return 0 if all(part["passed"] for part in document["parts"].values()) else 1


def describe_machine() -> dict[str, Any]:
    """The machine, its GPUs, and the versions that matter."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return describe_environment(
        gpus=[
            {"name": g.name, "memory_bytes": g.total_memory, "multiprocessors": g.multi_processor_count} for g in gpus
        ],
        driver=driver,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )


def run_part(part: Part) -> dict[str, Any]:
    """A part's rows. A case that fails is a row with its error; after two of them the rest is left out."""
    print(f"{part.name}: {part.question}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    began, failures = time.monotonic(), 0
    pool = WorkerPool()
    try:
        for what, case in part.cases.items():
            if failures == _MOST_FAILURES:
                rows.append({"what": what, "passed": False, "error": f"left out: {failures} cases of this part failed"})
                continue
            try:
                found = case(pool)
            except Exception as failure:
                failures += 1
                found = [{"what": what, "passed": False, "error": f"{type(failure).__name__}: {failure}"}]
                traceback.print_exc()
                pool.close()
                pool = WorkerPool()  # whatever hangs in the old one
            rows += found
            for row in found:
                print(f"  {_line(row)}", file=sys.stderr, flush=True)
    finally:
        pool.close()
    return {
        "question": part.question,
        "passed": all(row["passed"] is not False for row in rows),
        "rows": rows,
        "seconds": time.monotonic() - began,
    }


def table(document: dict[str, Any]) -> list[str]:
    """What was found, a line for each row."""
    machine = document["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    lines = [
        f"{gpus}; driver {machine['driver']}, CUDA {machine['cuda']}, NCCL {machine['nccl']}, torch {machine['torch']}"
    ]
    for name, part in document["parts"].items():
        lines += ["", f"{name}: {part['question']}  {'yes' if part['passed'] else 'NO'} ({part['seconds']:.0f} s)"]
        lines += [f"  {_line(row)}" for row in part["rows"]]
    return lines


def _line(row: dict[str, Any]) -> str:
    verdict = {True: "yes", False: "NO", None: "-"}[row["passed"]]
    shown = [f"{key} {_text(value)}" for key, value in row.items() if key not in _IN_JSON_ALONE]
    return f"{verdict:<4}{row['what']:<28}" + ", ".join(shown)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return "[" + " ".join(_text(each) for each in value) + "]"
    return str(value)


def main(args: Sequence[str] | None = None) -> int:
    """Run the check with the given words, or those of the command line; the exit code."""

    def work() -> None:
        warnings.showwarning = show_warning
        check: GpuCheck = command.parse(GpuCheck, prog="ppexec.gpucheck", description=GpuCheck.__doc__ or "", args=args)
        if check.execute():
            raise SystemExit(1)

    return ending.run(work, prog="ppexec.gpucheck", args=args)


if __name__ == "__main__":
    sys.exit(main())
