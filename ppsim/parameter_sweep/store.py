"""Store: the results of sweeps in SQLite, keyed by configuration.

What is written survives the death of any process. A power cut may lose the last rows.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsim.errors import InputError

_APPLICATION_ID = 0x70707377  # "ppsw": marks the file as ours
_SCHEMA_VERSION = 1
_WAIT_S = 60.0  # for another process that writes
_TABLE = """
CREATE TABLE results (
    key BLOB PRIMARY KEY,          -- SHA-256 of function and configuration
    function TEXT NOT NULL,        -- module.name
    configuration TEXT NOT NULL,   -- canonical JSON
    result TEXT,                   -- JSON; NULL where it failed
    error TEXT,                    -- one line; NULL where it did not fail
    traceback TEXT,
    took_s REAL,                   -- seconds in the function; NULL where the process was lost
    CHECK ((result IS NULL) != (error IS NULL))
)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PointOutcome:
    """What came of a point.

    Parameters
    ----------
    result : str or None
        What the function returned, as JSON. None where it failed.
    error, traceback : str or None
        error: one line, if the point failed. traceback: the whole traceback, if the function raised.
    took_s : float or None
        Seconds in the function. None where its process was lost.
    """

    result: str | None = None
    error: str | None = None
    traceback: str | None = None
    took_s: float | None = None


class Store:
    """Results by key, in one SQLite file. Several sweeps of one machine may use it at a time.

    Parameters
    ----------
    path : path or None
        The file, which is made if there is none. ":memory:" and None keep results in memory only.
    must_exist : bool
        Whether the file must exist and hold results.

    Raises
    ------
    InputError
        If the file is no store of this version.
    OSError
        As `open` raises it, if the file cannot be opened.
    """

    def __init__(self, path: str | Path | None, *, must_exist: bool = False) -> None:
        self._path = ":memory:" if path is None else str(path)
        in_memory = self._path == ":memory:"
        if not in_memory:
            # Opened once as a plain file, whose errors say what is wrong: SQLite says "unable to open database file".
            with Path(self._path).open("rb" if must_exist else "ab"):
                pass
        self._connection = sqlite3.connect(self._path, timeout=_WAIT_S, isolation_level=None)
        try:
            self._use(self._prepare, must_exist)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    def has_result(self, key: bytes) -> bool:
        """Whether the point has been computed. A failure does not count: it is tried again."""
        found = self._use(self._all, "SELECT 1 FROM results WHERE key = ? AND error IS NULL", (key,))
        return bool(found)

    def write(self, key: bytes, function: str, configuration: str, outcome: PointOutcome) -> None:
        """Keep an outcome, in a transaction of its own. A result that is there stays, a failure is replaced.

        Parameters
        ----------
        key : bytes
            As of `ppsim.parameter_sweep.key.digest`.
        function, configuration : str
            What the key was made of: "module.name" and canonical JSON.
        outcome : PointOutcome
            What came of the point.
        """
        self._use(
            self._all,
            "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET result = excluded.result,"
            " error = excluded.error, traceback = excluded.traceback, took_s = excluded.took_s"
            " WHERE results.error IS NOT NULL",
            (key, function, configuration, outcome.result, outcome.error, outcome.traceback, outcome.took_s),
        )

    def read(self, key: bytes) -> PointOutcome | None:
        """What came of a point, or None."""
        found = self._use(self._all, "SELECT result, error, traceback, took_s FROM results WHERE key = ?", (key,))
        return _outcome(found[0]) if found else None

    def rows(self) -> Iterator[tuple[str, str, PointOutcome]]:
        """Function, configuration and outcome of every point, in the order in which they were first written."""
        query = "SELECT function, configuration, result, error, traceback, took_s FROM results ORDER BY rowid"
        for function, configuration, *rest in self._use(self._all, query, ()):
            yield function, configuration, _outcome(rest)

    def _all(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        return self._connection.execute(query, values).fetchall()

    def _prepare(self, must_exist: bool) -> None:
        """Check that the file is ours, and make the table where the file is empty."""
        version = self._version()
        if version is None and must_exist:
            raise InputError(f"{self._path} holds no results: it is empty")
        if version is None:
            # In this mode readers do not wait for the writer, and commits do not wait for the disk. SQLite's own
            # waiting does not cover two processes that switch to the mode at once, hence `_patiently`.
            self._patiently("PRAGMA journal_mode = WAL")
            self._patiently("BEGIN IMMEDIATE")
            if self._version() is None:
                self._connection.execute(_TABLE)
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            self._connection.execute("COMMIT")
        elif version != _SCHEMA_VERSION:
            raise InputError(
                f"{self._path} is a store of version {version}, this is version {_SCHEMA_VERSION}: "
                "use the release that made it, or another file"
            )
        self._connection.execute("PRAGMA synchronous = NORMAL")  # enough for whatever happens to a process

    def _version(self) -> int | None:
        """The schema's version; None for an empty file. Raises InputError where the database is another's."""
        # Another process that makes the store commits table and application id together. Tables are counted first, so
        # whoever sees the table sees the id.
        tables = self._number("SELECT count(*) FROM sqlite_master")
        application_id = self._number("PRAGMA application_id")
        if application_id == _APPLICATION_ID:
            return self._number("PRAGMA user_version")
        if application_id != 0 or tables != 0:
            raise InputError(f"{self._path} is a database, but not a store of sweeps: give another path")
        return None

    def _number(self, query: str) -> int:
        return int(self._connection.execute(query).fetchone()[0])

    def _patiently(self, statement: str) -> None:
        give_up = time.monotonic() + _WAIT_S
        while True:
            try:
                self._connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.01)

    def _use(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # a fault of ours
            raise
        except sqlite3.DatabaseError as error:
            known = "not a database" in str(error) or "malformed" in str(error)
            what = "is not a store of sweeps, or is damaged" if known else "cannot be used as a store of sweeps"
            raise InputError(f"{self._path} {what} ({error}): give another path") from None


def _outcome(columns: Any) -> PointOutcome:
    result, error, traceback, took_s = columns
    return PointOutcome(result=result, error=error, traceback=traceback, took_s=took_s)
