"""Runs: the measured steps that the page was given, each known by what its file holds."""

from __future__ import annotations

import hashlib
import io
import tempfile
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

from ppsim.errors import InputError
from ppsim.explorer.question import MOST_ACTIONS
from ppsim.trace.trace import Trace

MOST_BYTES = 2**26  # of a trace file that is sent
_MOST_HELD = 2**29  # of what a file holds once it is unpacked
_KEPT = 8


class Runs:
    """The last few runs, by number. May be used from several threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[str, Trace]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes, name: str) -> str:
        """Take in a saved trace and return its number, which is the same whenever the same file is given.

        Parameters
        ----------
        data : bytes
            What the file holds.
        name : str
            How the page shall call it.

        Raises
        ------
        InputError
            If it is no saved trace, or too large to be shown.
        """
        return self.keep(_trace_in(data, name), name)

    def keep(self, trace: Trace, name: str) -> str:
        """Take in a trace. Raises InputError if it is too large to be shown."""
        if len(trace.start_s) > MOST_ACTIONS:
            raise InputError(
                f"{name} has {len(trace.start_s)} actions, the page draws at most {MOST_ACTIONS}: give a shorter run"
            )
        parts = (trace.start_s.tobytes(), trace.end_s.tobytes(), trace.schedule.to_csv().encode())
        number = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        with self._lock:
            self._held[number] = (name, trace)
            self._held.move_to_end(number)
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)
        return number

    def get(self, number: str) -> tuple[str, Trace]:
        """Name and trace of a run. Raises InputError for one that is not here."""
        with self._lock:
            if number not in self._held:
                raise InputError(f"run {number[:16]} is not loaded: drop its trace file on the page again")
            return self._held[number]


def _trace_in(data: bytes, name: str) -> Trace:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = sum(each.file_size for each in archive.infolist())
    except zipfile.BadZipFile:
        raise InputError(
            f"{name} is not a saved trace: give one that ppexec run --out wrote to a name without .json or .csv"
        ) from None
    if held > _MOST_HELD:
        raise InputError(f"{name} holds {held} bytes, the page takes at most {_MOST_HELD}: give a shorter run")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        path.write_bytes(data)
        try:
            trace = Trace.load(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from None
    return trace
