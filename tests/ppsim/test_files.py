"""Files: reading says what is wrong, and whatever stops a write leaves the old file and no other."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ppsim
from ppsim import InputError, LayerCost, Network, StageCost
from ppsim.cli.main import main
from ppsim.export.html_report import Report
from ppsim.export.trace_files import write_trace
from ppsim.files import (
    MOST_BYTES,
    check_directory,
    check_files,
    read_json,
    read_text,
    replacing,
    write_bytes,
    write_text,
)

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
LAYER = LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1, name="a")
TRACE = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), [COST] * 2)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

# Everything that ppsim writes, by the file's name.
WRITERS: dict[str, Callable[[Path], Any]] = {
    "trace.npz": TRACE.save,
    "trace.csv": lambda path: write_trace(TRACE, path),
    "trace.json": lambda path: write_trace(TRACE, path),
    "trace.json.gz": lambda path: write_trace(TRACE, path),
    "costs.json": lambda path: ppsim.save_costs([LAYER], path),
    "costs.csv": lambda path: ppsim.save_costs([LAYER], path),
    "network.json": Network().to_file,
    "report.html": Report(title="a").save,
    "schedule.csv": lambda path: main(["schedule", *_WORDS, "--csv", str(path)]),
}
_WORDS = ["--schedule", "1f1b", "--ranks", "2", "--microbatches", "4"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"\xef\xbb\xbfx\r\n")
    (tmp_path / "bad").write_bytes(b"\xff\x00")
    assert read_text(tmp_path / "good") == "x\n"
    with pytest.raises(InputError, match="bad is not text"):
        read_text(tmp_path / "bad")
    with pytest.raises(InputError, match=r"good is not JSON: .* line 1 column 1"):
        read_json(tmp_path / "good")
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)


def test_a_file_without_end_is_refused() -> None:
    """Cause of a bug: --from-csv /dev/zero filled the memory."""
    with pytest.raises(InputError, match="/dev/zero is larger than 1 GiB: give a smaller file"):
        read_text("/dev/zero")
    assert MOST_BYTES == 2**30


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "stop", [FULL, KeyboardInterrupt(), RuntimeError("a fault")], ids=lambda stop: type(stop).__name__
)
def test_a_write_that_is_stopped_leaves_the_old_file_alone(
    name: str, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes when everything has been written and nothing is in its place yet: the worst moment."""
    path = tmp_path / name
    path.write_text("old")

    def stopped(self: Path, target: Path) -> None:
        assert self.stat().st_size > 0
        raise stop

    monkeypatch.setattr(Path, "replace", stopped)
    if name == "schedule.csv":  # a command, which says so in one line
        assert WRITERS[name](path) != 0
    else:
        with pytest.raises(type(stop)) as caught:
            WRITERS[name](path)
        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_written_replaces_the_old_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    new = path.read_bytes()
    path.write_text("old")
    path.chmod(0o640)
    WRITERS[name](path)
    if not name.endswith(".npz"):  # whose zip holds times
        assert path.read_bytes() == new
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_new_file_has_the_rights_that_files_have(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_stays_one_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    write_text(os.devnull, "new")
    assert not Path(os.devnull).is_file()
    written = subprocess.run(
        [sys.executable, "-c", "from ppsim.files import write_text; write_text('/dev/stdout', 'shown')"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert written.stdout == "shown"


def test_writers_at_one_time_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end
    program = (
        "import sys\nfrom ppsim.files import write_bytes\n"
        "for turn in range(200): write_bytes(sys.argv[1], sys.argv[2].encode() * 50_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert len(set(path.read_bytes()[-50_000:])) <= 3  # "one" at first, then never a mixture
        content = path.read_bytes()
        assert content == b"one" or content in (b"a" * 50_000, b"b" * 50_000)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("flag", ["--csv", "--out"])
def test_what_cannot_be_written_is_one_sentence(
    flag: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", refused)
    command = ["schedule", *_WORDS] if flag == "--csv" else ["simulate", *_WORDS]
    assert main([*command, flag, str(tmp_path / "x.csv")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    doing = "write" if number == errno.ENOSPC else "open"
    assert line.startswith(f"ppsim: cannot {doing} '{tmp_path}/x.csv': {os.strerror(number)}. ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert main(["schedule", *_WORDS, "--csv", str(tmp_path / "x.csv")]) == 2
    assert "Permission denied. Give a path that you may use" in capsys.readouterr().err


def test_escaped_where_utf8_has_no_spelling(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_bytes() == b"\\ud800"
    write_bytes(tmp_path / "x", b"\xff")
    assert (tmp_path / "x").read_bytes() == b"\xff"


def test_a_directory_in_whose_way_a_file_is_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(InputError, match="is a file; give a directory"):
            check_directory(directory)
    check_directory(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_a_file_is_checked_before_the_work_as_it_is_written_after_it(tmp_path: Path, monkeypatch: Any) -> None:
    """/dev/stdout was refused to all but root, and a read-only file only after the work."""
    (tmp_path / "kept").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == str(tmp_path))  # as for a user who is not root
    check_files(Path("/dev/stdout"))
    check_files(tmp_path / "new")
    for path, says in ((tmp_path / "kept", "read-only"), (tmp_path, "a directory"), (tmp_path / "no" / "x", "no dir")):
        with pytest.raises(InputError, match=says):
            check_files(path)
