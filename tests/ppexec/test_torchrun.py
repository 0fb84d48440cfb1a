"""Under torchrun the processes that exist are the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TINY = "--layers 4 --hidden 8 --seq 2 --micro-batch-size 1 --microbatches 4 --steps 1"


def torchrun(processes: int, words: str) -> subprocess.CompletedProcess[str]:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m ppexec.cli"
    return subprocess.run(
        [sys.executable, *launch.split(), *words.split()],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_verify_under_torchrun_prints_one_report() -> None:
    done = torchrun(2, f"verify {TINY} --schedule 1f1b --json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["outputs_bit_equal"] is True
    assert report["gradients_bit_equal"] is True
    assert report["config"]["ranks"] == 2


def test_another_number_of_processes_is_refused_with_both_numbers() -> None:
    done = torchrun(1, f"verify {TINY} --ranks 2 --json")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "ppexec: dp 1 x ranks 2 x tp 1 needs 2 processes, there are 1: start that many" in done.stderr
