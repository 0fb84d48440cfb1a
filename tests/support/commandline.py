"""The command line called in this process, for tests."""

from __future__ import annotations

import json

import pytest

from ppsim.cli.main import main

AFAB = "--schedule afab --ranks 3 --microbatches 4"
COSTS = "--forward-s 1 --backward-input-s 0.75 --backward-weight-s 0.5"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; every argument is split at spaces."""
    code = main([word for part in words for word in part.split()])
    return code, *capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """The one object that `--json` prints, with nothing beside it."""
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one message of a call that is refused."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("ppsim: ")
    assert err.count("\n") == 1
    assert len(err) < 1000
    return err
