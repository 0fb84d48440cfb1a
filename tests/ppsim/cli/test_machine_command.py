"""The command `ppsim fit-machine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsim import Machine
from ppsim.cli.main import main

HEADER = "global_batch,micro_batch_size,hidden,heads,layers,seq,tp,dp,pp,step_s"
ROWS = [
    f"16,{b},1024,16,{layers},1024,{t},1,{p},{0.1 * layers / t / p:.3f}"
    for b in (2, 4)
    for layers in (8, 16)
    for t in (1, 2)
    for p in (1, 2)
]


def test_a_machine_is_fitted_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, out = tmp_path / "steps.csv", tmp_path / "machine.json"
    steps.write_text("\n".join([HEADER, *ROWS]))
    assert main(["fit-machine", str(steps), "--held-back", "0.25", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["errors"]["fitted"]["steps"] == 12
    assert document["errors"]["held back"]["steps"] == 4
    assert Machine.from_file(out).launch_s == document["constants"]["launch_s"]
    assert main(["fit-machine", str(steps)]) == 0
    said = capsys.readouterr().out
    assert "seconds that the host takes" in said
    assert f"({steps}, row " in said


def test_bad_input_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.csv"
    steps.write_text("a,b\n1,2\n")
    assert main(["fit-machine", str(steps)]) == 2
    assert "has no column 'global_batch'" in capsys.readouterr().err
    assert main(["fit-machine", str(steps), "--held-back", "1.5"]) == 2
    assert "--held-back must be a share" in capsys.readouterr().err
    steps.write_text("\n".join([HEADER, *ROWS]))
    assert main(["fit-machine", str(steps), "--seed", "-1"]) == 2  # cause of a bug: NumPy's own error was shown
    assert "seed must be 0 or more, got -1" in capsys.readouterr().err
