"""Colour: whether a terminal shows colours, and text in the colour of a kind of action."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

from ppsim.palette import KIND_COLOURS
from ppsim.schedule.action import Kind

_LEVELS = (0, 95, 135, 175, 215, 255)  # xterm's colours 16 to 231: a cube of these, red slowest
_RESET = "\x1b[0m"


def refuses_colour() -> bool:
    """Whether the user wants no colours anywhere; see no-color.org."""
    return bool(os.environ.get("NO_COLOR"))


def painter(stream: TextIO) -> Callable[[str, Kind], str] | None:
    """What paints text in the colour of a kind; None where the stream is no terminal, or colours are not wanted.

    Parameters
    ----------
    stream : text file
        Where the text is going.

    Notes
    -----
    The text stands on the kind's colour, in black or white, so that it can be read on terminals of any colour.
    Terminals that do not say they know 16 million colours (COLORTERM) get the nearest of 256.
    """
    if refuses_colour() or os.environ.get("TERM") in (None, "dumb") or not stream.isatty():
        return None
    has_all = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    codes = {kind: _codes(colour, has_all=has_all) for kind, colour in KIND_COLOURS.items()}
    return lambda text, kind: f"{codes[kind]}{text}{_RESET}"


def _codes(colour: str, *, has_all: bool) -> str:
    """What turns a terminal to this background, and to the foreground that is read on it."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128  # ITU-R BT.601
    steps = [min(range(6), key=lambda step: abs(_LEVELS[step] - each)) for each in (red, green, blue)]
    nearest = 16 + 36 * steps[0] + 6 * steps[1] + steps[2]
    background = f"48;2;{red};{green};{blue}" if has_all else f"48;5;{nearest}"
    return f"\x1b[{97 if is_dark else 30};{background}m"
