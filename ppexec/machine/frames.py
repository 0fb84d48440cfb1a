"""Frames: the part of a traceback that lies in the user's own code."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch

import ppsim

_NOT_THE_USERS = (
    str(Path(__file__).parents[1]),
    str(Path(ppsim.__file__).parent),
    str(Path(torch.__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
    "<string>",
)


def user_frames(error: BaseException) -> str:
    """The frames of an error that lie neither here, nor in torch, the standard library or an installed package.

    Returns
    -------
    str
        As Python prints them, the innermost last; empty if there are none.
    """
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return "".join(traceback.format_list(own)).rstrip()
