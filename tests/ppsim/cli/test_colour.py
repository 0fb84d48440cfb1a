"""Colour: in terminals that show it, for users who want it, and nowhere else."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from ppsim.cli.colour import painter
from ppsim.palette import KIND_COLOURS
from ppsim.schedule.action import Kind

_CODE = "import sys; from ppsim.cli.main import main; sys.exit(main())"
_SCHEDULE = ["schedule", "--schedule", "zb-h1", "--ranks", "2", "--microbatches", "2"]
_PAINTED = re.compile(r"\x1b\[[0-9;]+m")


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def in_terminal(words: list[str], **environment: str) -> str:
    """What a command prints to a real terminal."""
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLORTERM")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", _CODE, *words],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        env={**known, "TERM": "xterm-256color", **environment},
    ) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:  # Linux says so once the other side has closed
                break
            if not read:
                break
            text += read
    os.close(ours)
    assert process.returncode == 0
    return text.decode().replace("\r\n", "\n")


def test_a_terminal_shows_the_grid_in_the_kinds_colours() -> None:
    plain = subprocess.run([sys.executable, "-c", _CODE, *_SCHEDULE], capture_output=True, text=True, check=True).stdout
    painted = in_terminal(_SCHEDULE, COLORTERM="truecolor")
    assert "\x1b" not in plain
    assert _PAINTED.sub("", painted) == plain
    for kind in (Kind.F, Kind.I, Kind.W):
        red, green, blue = bytes.fromhex(KIND_COLOURS[kind][1:])
        assert re.search(rf"48;2;{red};{green};{blue}m\s*{kind.name}0\x1b\[0m", painted)


def test_who_wants_no_colour_gets_none() -> None:
    assert "\x1b" not in in_terminal(_SCHEDULE, NO_COLOR="1")
    assert "\x1b" not in in_terminal(["schedule", "--help"], NO_COLOR="1")
    assert "\x1b" not in in_terminal(_SCHEDULE, TERM="dumb")


@pytest.mark.parametrize("kind", list(KIND_COLOURS))
def test_terminals_with_256_colours_get_the_nearest(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force over xterm's cube as its 256colres.pl makes it: a level is 0, or 55 and 40 for each step."""
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    wanted = bytes.fromhex(KIND_COLOURS[kind][1:])

    def distance(code: int) -> int:
        steps = (code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6
        levels = [step * 40 + 55 if step else 0 for step in steps]
        return sum((level - each) ** 2 for level, each in zip(levels, wanted, strict=True))

    paint = painter(Terminal())
    assert paint is not None
    painted = re.search(r";48;5;(\d+)m", paint("x", kind))
    assert painted is not None
    assert distance(int(painted[1])) == min(map(distance, range(16, 232)))
    assert painter(io.StringIO()) is None
