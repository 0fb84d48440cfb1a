"""What both command lines share: flags from dataclasses, and one line for words that do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ppsim.cli import command


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
