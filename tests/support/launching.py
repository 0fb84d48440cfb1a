"""Launching: commands under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(flags: str, processes: int, words: str) -> subprocess.Popen[str]:
    command = f"-m torch.distributed.run {flags} --nproc-per-node {processes} -m ppexec.cli {words}"
    return subprocess.Popen(
        [sys.executable, *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def torchrun(processes: int, words: str) -> subprocess.CompletedProcess[str]:
    started = launch("--standalone", processes, words)
    out, err = started.communicate(timeout=240)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)
