"""Studies called in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


def load(name: str) -> ModuleType:
    """A study's script as a module."""
    specification = importlib.util.spec_from_file_location(f"study_{name}", STUDIES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def run(name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard output of a study."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split()])
    code = load(name).main()
    return code, capsys.readouterr().out
