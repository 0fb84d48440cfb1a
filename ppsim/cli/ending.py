"""Ending: how a command ends: its exit code, one message for what went wrong, JSON for what it found."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppsim.errors import InputError, RunError


def run(work: Callable[[], None], *, prog: str, args: Sequence[str] | None = None) -> int:
    """Do the work of a command and return its exit code. Whatever goes wrong becomes one message on standard error.

    Parameters
    ----------
    work : callable
        Does all of it; may raise SystemExit.
    prog : str
        Name of the command, for messages.
    args : sequence of str, optional
        The words of its command line. By default those of `sys.argv`.

    Returns
    -------
    int
        0: done, or the code of a SystemExit. 1: a run failed after it began (RunError), or a fault of this project,
        whose traceback follows the message (with `--json` it is kept in a file, which the message names). 2: bad input:
        an InputError, a file that cannot be read or written, or a size that memory does not hold. 130: interrupted.
        141: whoever read standard output stopped (`| head`), which is no error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`): print knows that, tyro does not
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for as long as Python runs)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in files may have what a terminal cannot show
    try:
        code = 0
        try:
            work()
        except SystemExit as stop:  # help was printed, or the work's answer is no
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()  # here, not when Python ends: a closed pipe must be noticed where it can be handled
        return code
    except BrokenPipeError:
        _drop_output()
        return 141
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:
        message, code = _reason(error), 2
    except MemoryError as error:
        message, code = f"not enough memory ({str(error) or 'no size given'}): take fewer microbatches or ranks", 2
    except (InputError, RunError) as error:
        message, code = "\n".join(filter(None, [str(error), error.details])), 2 if isinstance(error, InputError) else 1
    except Exception as error:
        is_json = "--json" in (sys.argv[1:] if args is None else args)
        message, code = _fault(error, to_file=is_json), 1
    message = "\n".join(map(printable, _LONG_WORD.sub(lambda word: f"{word[0][:97]}...", message).split("\n")))
    with contextlib.suppress(OSError, ValueError):
        print(f"{prog}: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    return code


def printable(text: str) -> str:
    """One line of text with what a terminal would obey, or UTF-8 cannot hold, as escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _fault(error: Exception, *, to_file: bool) -> str:
    """What is said of an error that no input should cause."""
    frames = "".join(traceback.format_exception(error)).rstrip()
    kept = f"\n{frames}"
    if to_file:
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", prefix="traceback-", suffix=".txt", delete=False
            ) as file,
        ):
            file.write(f"{frames}\n")
            kept = f" with the traceback in {file.name}"
    return f"this is a fault of this project, please report it ({type(error).__name__}: {error}){kept}"


_LONG_WORD = re.compile(r"\S{400,}")  # a value of that length would hide what is said of it
_REMEDIES = {
    errno.ENOSPC: "Make room, or give another path",
    errno.EACCES: "Give a path that you may use",
    errno.EROFS: "Give a path that can be written",
}


def _reason(error: OSError) -> str:
    said = error.strerror or str(error)
    if error.filename is None:
        return f"cannot read or write: {said}"
    remedy = _REMEDIES.get(error.errno or 0, "Give the path of a file")
    doing = "write" if error.errno == errno.ENOSPC else "open"
    return f"cannot {doing} {error.filename!r}: {said}. {remedy}"


def _drop_output() -> None:
    """Point standard output nowhere, so that Python's last flush finds nobody to complain about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on one line; arrays and NumPy numbers become lists and numbers.

    Raises InputError for NaN and infinities, which JSON does not have.
    """
    print(json.dumps(document, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
