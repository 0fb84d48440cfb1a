"""Ctrl-C: everything ends soon, whatever is under way, and nothing but "interrupted" is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.factories import spelled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")

COMMAND = "import sys, ppexec.cli; print('imported', flush=True); sys.exit(ppexec.cli.main())"
FLAGS = ["--layers", "4", "--ranks", "2", "--microbatches", "4", "--hidden", "4", "--seq", "1", "--threads", "1"]


def processes_of(session: int) -> list[str]:
    """The command lines of a session's processes that still run."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of_session = (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            words = (directory / "cmdline").read_text()
        except OSError:
            continue
        if int(of_session) == session and state != "Z":
            found.append(words)
    return found


@pytest.mark.parametrize("whom", ["all", "parent"])
@pytest.mark.parametrize("when", ["the fork server imports", "a step is under way"])
def test_ctrl_c_ends_everything(when: str, whom: str) -> None:
    model = spelled("with_one", kind="Sleeps", at=1)
    program = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", "--model", model, *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "imported\n"
    wanted = 3 if when == "the fork server imports" else 5  # the tracker of resources, the fork server, the workers
    while len(processes_of(program.pid)) < wanted:
        time.sleep(0.01)
    time.sleep(0.2 if wanted == 3 else 3)
    began_s = time.monotonic()
    (os.killpg if whom == "all" else os.kill)(program.pid, signal.SIGINT)
    _, said = program.communicate(timeout=30)
    while processes_of(program.pid) and time.monotonic() - began_s < 30:
        time.sleep(0.01)
    took_s = time.monotonic() - began_s
    assert (program.returncode, said) == (130, "ppexec: interrupted\n")
    assert took_s < 10  # about 1 s where nothing else runs; the promise is 3 s
