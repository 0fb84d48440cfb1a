"""What both command lines share: flags from dataclasses, one message for every error, JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim.cli import command
from ppsim.errors import InputError, RunError


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of every type."""

    whole: command.OptionalWhole = None
    """A whole number."""
    real: command.OptionalReal = None
    """A number."""
    file: command.OptionalFile = None
    """A file."""
    name: command.OptionalName = None
    """A name."""
    latency_s: command.Real = 0.5
    """Seconds."""
    plain: int = 3
    """An int as tyro reads it."""
    json: bool = False
    """JSON."""


def _parse(*args: str) -> Flags:
    return command.parse(Flags, prog="tool", description="A tool.", args=args)


def test_flags_are_the_fields() -> None:
    assert _parse() == Flags()
    given = _parse(*("--whole", "-3", "--real", "1e-3", "--file", "a/b", "--name", "x", "--latency-s", "2", "--json"))
    assert given == Flags(whole=-3, real=1e-3, file=Path("a/b"), name="x", latency_s=2.0, json=True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--whole", "2.5"], "--whole must be a whole number, got '2.5'; see tool --help"),
        (["--whole", "None"], "--whole must be a whole number, got 'None'; see tool --help"),
        (["--real", "x" * 1000], f"--real must be a number, got '{'x' * 57}...'; see tool --help"),
        (["--plain", "x"], "--plain invalid literal for int() with base 10: 'x'; see tool --help"),
        (["--whole"], "Missing value for argument '--whole'. Expected 1 values; see tool --help"),
        (["--latncy-s", "2"], "Unrecognized options: --latncy-s, 2; perhaps you meant --latency-s; see tool --help"),
        (["stray"], "Unrecognized options: stray; see tool --help"),
    ],
)
def test_words_that_do_not_fit_are_one_line(args: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="see tool --help") as caught:
        _parse(*args)
    assert str(caught.value) == said


_BOX = """
╭─ Unrecognized options ──────────────────────╮
│ Unrecognized options: --rnks, 3             │
│ ─────────────────────────────────────────── │
│ Perhaps you meant:                          │
│     --ranks INT                             │
│         p: number of ranks.                 │
│ ─────────────────────────────────────────── │
│ For full helptext, run ppsim --help         │
╰─────────────────────────────────────────────╯
"""
_PLAIN = """\
 Unrecognized options
 --------------------------------------
  Unrecognized options: --rnks, 3
  --------------------------------------
  Perhaps you meant:
      --ranks INT
          p: number of ranks.
  --------------------------------------
  For full helptext, run ppsim --help
"""


@pytest.mark.parametrize("text", [_BOX, _PLAIN])
def test_both_of_tyros_frames_are_taken_off(text: str) -> None:
    """Cause of a bug: where standard output is not UTF-8 the frame is drawn otherwise."""
    said = "Unrecognized options: --rnks, 3; perhaps you meant --ranks; see ppsim --help"
    assert command._without_frame(text) == said


def test_help_has_defaults_only_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "A tool." in printed or "Flags of every type." in printed
    assert "(default: 0.5)" in printed
    assert "None" not in printed
    assert "unset" not in printed


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
    assert command.run(lambda: _raises(error), prog="tool") == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), ValueError("too many values to unpack")])
def test_a_fault_of_ours_is_no_bad_input(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    """A ValueError that no check of ours raised was taken for bad input, with exit code 2."""
    assert command.run(lambda: _raises(error), prog="tool") == 1
    first, *frames = capsys.readouterr().err.splitlines()
    assert first == f"tool: this is a fault of this project, please report it ({type(error).__name__}: {error})"
    assert frames[0].startswith("Traceback")
    assert frames[-1] == f"{type(error).__name__}: {error}"


def test_with_json_the_traceback_is_kept_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert command.run(lambda: _raises(KeyError("ours")), prog="tool", args=["run", "--json"]) == 1
    said = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert (
        said
        == f"tool: this is a fault of this project, please report it (KeyError: 'ours') with the traceback in {kept}\n"
    )
    assert "_raises(KeyError" in kept.read_text(encoding="utf-8")


def test_done_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(lambda: print("done"), prog="tool") == 0
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
        command.print_json(document)
    assert len(printed) == 1
    assert "\n" not in printed[0]
    assert json.loads(printed[0]) == document


def test_arrays_become_lists(capsys: pytest.CaptureFixture[str]) -> None:
    command.print_json({"a": np.array([1.5, 2]), "n": np.int64(3), "f": np.float32(0.5), "p": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, 2.0], "n": 3, "f": 0.5, "p": "x"}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.array([math.nan])])
def test_json_has_no_nan(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        command.print_json({"a": value})


def test_what_has_no_json_form_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        command.print_json({"a": {1}})
