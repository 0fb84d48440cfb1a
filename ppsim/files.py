"""Files: reading that says what is wrong, and results that take the place of old ones all at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppsim.errors import InputError

MOST_BYTES = 2**30  # of a text that is read; a device such as /dev/zero has no end


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises OSError if it cannot be read, InputError if it has more than `most` bytes."""
    data = bytearray()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):  # to ask for all of `most` at once would take as much memory
            data += block
            if len(data) > most:
                raise InputError(f"{path} is larger than {most / 2**30:g} GiB: give a smaller file")
    return bytes(data)


def read_text(path: str | Path, error: type[InputError] = InputError) -> str:
    """The text of a file. Raises OSError if it cannot be read, `error` if it is not text, InputError if too large."""
    try:
        # Spreadsheets put a byte order mark first. Lines may end as on any system.
        return read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise error(f"{path} is not text: give a text file") from None


def read_json(path: str | Path, error: type[InputError] = InputError) -> Any:
    """The JSON value in a file. Raises OSError if it cannot be read, `error` if it is not JSON."""
    return parse_json(path, read_text(path, error), error)


def parse_json(path: str | Path, text: str, error: type[InputError] = InputError) -> Any:
    """The JSON value in a file's text. Raises `error`, with the place in the file, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as wrong:  # besides bad syntax: numbers or nesting beyond Python's limits
        raise error(f"{path} is not JSON: {wrong}") from None


def check_directory(directory: Path) -> None:
    """Check that files can be written to a directory, which is there or can be made.

    Raises
    ------
    InputError
        If a file is in its way, or nothing may be written there.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(
            f"cannot write to {directory}: {there} is not a directory, it is a file; give a directory, new or old"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {directory}: nothing may be written in {there}; give another directory")


def check_files(*paths: Path | None) -> None:
    """Check that files can be written, before the work whose results they are to hold. None is no file.

    Raises
    ------
    InputError
        If one is a directory, or its directory is not there or may not be written to.
    """
    for path in paths:
        if path is not None:
            _check_file(path)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; give the path of a file")
    if _is_written_directly(path):
        return
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: it is read-only; give another path")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {str(path.parent)!r}; make it first")
    check_directory(path.parent)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place when the block has ended.

    Until then, and whatever ends the block early (an exception, Ctrl-C, a full disk), the old file stays as it was and
    the new one is removed. Several writers do not disturb each other: the last one's file stays. A link is followed,
    and what is no file, such as /dev/stdout, is written to directly.

    Parameters
    ----------
    path : str or Path
        What is to be written.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    OSError
        With `path` as its file name, if it cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(f"{folder}/new.txt") as beside:
    ...         _ = beside.write_text("all of it")
    ...     print(Path(f"{folder}/new.txt").read_text())
    all of it
    """
    given = Path(path)
    if _is_written_directly(given):
        yield given
        return
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if target.exists():
            if not os.access(target, os.W_OK):
                raise PermissionError(13, "Permission denied", str(path))
            shutil.copymode(target, beside)
        yield beside
        beside.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _is_written_directly(path: Path) -> bool:
    """Whether nothing can take its place, as of /dev/stdout or a pipe."""
    return (path.is_absolute() and path.parts[1:2] == ("dev",)) or (path.exists() and not path.is_file())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file's content. Raises OSError, and leaves the old content, if it cannot be written."""
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's content by text, as `write_bytes` does. What UTF-8 cannot hold is escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))
