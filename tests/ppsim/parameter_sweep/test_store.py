"""Stores: what is in stays in, two may write, and another's file is refused and left as it was."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ppsim import load_sweep, sweep
from ppsim.parameter_sweep.store import PointOutcome, Store
from tests.support.sweeping import square


def test_a_result_stays_and_a_failure_is_replaced(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        assert store.read(b"k") is None
        store.write(b"k", "f", "{}", PointOutcome(error="first"))
        assert not store.has_result(b"k")
        store.write(b"k", "f", "{}", PointOutcome(error="second"))
        assert store.read(b"k") == PointOutcome(error="second")
        store.write(b"k", "f", "{}", PointOutcome(result="1", took_s=0.5))
        assert store.has_result(b"k")
        store.write(b"k", "f", "{}", PointOutcome(result="2"))
        store.write(b"k", "f", "{}", PointOutcome(error="third"))
        assert store.read(b"k") == PointOutcome(result="1", took_s=0.5)
        assert len(list(store.rows())) == 1


def test_nothing_is_kept_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, ":memory:"):
        with Store(path) as store:
            store.write(b"k", "f", "{}", PointOutcome(result="1"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_there_although_the_writer_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    script = (
        "import os, signal, sys\nfrom ppsim.parameter_sweep.store import PointOutcome, Store\n"
        "store = Store(sys.argv[1])\n"
        "for n in range(50):\n    store.write(b'%d' % n, 'f', '{}', PointOutcome(result=str(n)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    with Store(path, must_exist=True) as store:
        assert [outcome.result for _, _, outcome in store.rows()] == [str(n) for n in range(50)]


def test_a_store_that_another_process_makes_between_two_looks_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cause of a bug: the mark was read before the tables, so the other's new store looked like a foreign database."""
    path, look, made = tmp_path / "s.sqlite", Store._number, []

    def look_while_another_makes_it(store: Store, query: str) -> int:
        found = look(store, query)
        if not made:
            made.append(path)
            Store(path).close()
        return found

    monkeypatch.setattr(Store, "_number", look_while_another_makes_it)
    with Store(path) as store:
        store.write(b"k", "f", "{}", PointOutcome(result="1"))


def test_four_processes_open_and_write_one_new_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    script = (
        "import sys\nfrom ppsim.parameter_sweep.store import PointOutcome, Store\nsys.stdin.readline()\n"
        "with Store(sys.argv[1]) as s:\n"
        "    for n in range(100):\n        s.write(b'%d' % n, 'f', '{}', PointOutcome(result=sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", script, str(path)]
    writers = [subprocess.Popen([*arguments, str(number)], stdin=subprocess.PIPE, text=True) for number in range(4)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    with Store(path, must_exist=True) as store:
        assert len(list(store.rows())) == 100


def _foreign(path: Path, *statements: str) -> Path:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


def test_files_of_another_kind_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be taken for one" * 100)
    other = _foreign(tmp_path / "other.sqlite", "CREATE TABLE people (name TEXT)")
    marked = _foreign(tmp_path / "marked.sqlite", "PRAGMA application_id = 7", "CREATE TABLE results (key)")
    for path, reason in ((text, "is not a store"), (other, "not a store"), (marked, "not a store")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path.name}.*{reason}.*another path"):
            sweep(square, {"a": [1]}, store=path, progress=False)
        with pytest.raises(ValueError, match=path.name):
            load_sweep(path)
        assert path.read_bytes() == before


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    Store(path).close()
    _foreign(path, "PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="version 99, this is version 1"):
        Store(path)


def test_paths_that_cannot_be_opened_say_so_as_open_does(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store(tmp_path / "none" / "s.sqlite")
    with pytest.raises(IsADirectoryError):
        Store(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_sweep(tmp_path / "none.sqlite")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_becomes_a_store_but_is_none_to_read(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.touch()
    with pytest.raises(ValueError, match="holds no results"):
        load_sweep(path)
    Store(path).close()
    assert len(load_sweep(path)) == 0
