"""The README's examples run as they stand."""

from __future__ import annotations

import re
import shlex
import webbrowser
from pathlib import Path

import pytest

import ppsim
from ppsim.cli.main import main
from ppsim.explorer.server import ExplorerServer
from ppsim.schedule.named import registry

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ppexec" not in block]
COMMANDS = [
    line.split("#")[0]
    for line in README.splitlines()
    if line.startswith("ppsim ") and not re.search(r"costs\.json|steps\.csv|\.trace", line)
]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0])
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_has_examples() -> None:
    assert len(PYTHON) == 3
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: None)  # it would wait for Ctrl-C
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out


def test_every_schedule_is_named() -> None:
    assert [name for name in ppsim.schedule_names() if f"`{name}`" not in README] == []


def test_every_study_is_named() -> None:
    studies = Path(__file__).parents[1] / "studies"
    assert [path.name for path in studies.glob("*.py") if f"`studies/{path.name}`" not in README] == []
