"""How a command ends: one message for every error, an exit code, JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim.cli import ending
from ppsim.errors import InputError, RunError


def _raises(error: BaseException) -> None:
    print("half of the output")
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("p must be 1 or more, got 0"), 2, "tool: p must be 1 or more, got 0\n"),
        (RunError("rank 1 died"), 1, "tool: rank 1 died\n"),
        (RunError("rank 1 died", "in model.py"), 1, "tool: rank 1 died\nin model.py\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.csv"),
            2,
            "tool: cannot open 'x.csv': No such file or directory. Give the path of a file\n",
        ),
        (OSError(28, "No space left on device"), 2, "tool: cannot read or write: No space left on device\n"),
        (OSError("strange"), 2, "tool: cannot read or write: strange\n"),
        (MemoryError(), 2, "tool: not enough memory (no size given): take fewer microbatches or ranks\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_errors_become_one_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest's own standard output stays
    assert ending.run(lambda: _raises(error), prog="tool") == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), ValueError("too many values to unpack")])
def test_a_fault_of_ours_is_no_bad_input(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    """A ValueError that no check of ours raised was taken for bad input, with exit code 2."""
    assert ending.run(lambda: _raises(error), prog="tool") == 1
    first, *frames = capsys.readouterr().err.splitlines()
    assert first == f"tool: this is a fault of this project, please report it ({type(error).__name__}: {error})"
    assert frames[0].startswith("Traceback")
    assert frames[-1] == f"{type(error).__name__}: {error}"


def test_with_json_the_traceback_is_kept_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ending.run(lambda: _raises(KeyError("ours")), prog="tool", args=["run", "--json"]) == 1
    said = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert (
        said
        == f"tool: this is a fault of this project, please report it (KeyError: 'ours') with the traceback in {kept}\n"
    )
    assert "_raises(KeyError" in kept.read_text(encoding="utf-8")


def test_done_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.run(lambda: print("done"), prog="tool") == 0
    assert capsys.readouterr() == ("done\n", "")


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    )
)
def test_json_is_one_object_on_one_line(document: dict) -> None:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        ending.print_json(document)
    assert len(printed) == 1
    assert "\n" not in printed[0]
    assert json.loads(printed[0]) == document


def test_arrays_become_lists(capsys: pytest.CaptureFixture[str]) -> None:
    ending.print_json({"a": np.array([1.5, 2]), "n": np.int64(3), "f": np.float32(0.5), "p": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, 2.0], "n": 3, "f": 0.5, "p": "x"}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.array([math.nan])])
def test_json_has_no_nan(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        ending.print_json({"a": value})


def test_what_has_no_json_form_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        ending.print_json({"a": {1}})
