"""The README's examples run as they stand: each block of Python, and each command."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from dask.distributed import LocalCluster

import ppsim
from ppexec.cli import main as ppexec_main
from ppsim.cli.main import main as ppsim_main
from ppsim.explorer.server import ExplorerServer
from ppsim.schedule.named import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line
]
# What CI does in an environment of its own, and what needs a GPU.
INSTALL = [line for line in SHELL if line.startswith("python3 -m venv")]
GPU = [line for line in SHELL if re.search(r"nccl|cuda|gpucheck", line)]
COMMANDS = [line for line in SHELL if line not in INSTALL + GPU]
MODEL = next(block for block in PYTHON if block.startswith("# mymodel.py"))


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command; standard output is not caught where it is another process's."""
    words = shlex.split(line)
    if words[0] in ("ppsim", "ppexec"):
        monkeypatch.setattr(sys, "argv", words)
        return ppsim_main(words[1:]) if words[0] == "ppsim" else ppexec_main(words[1:])
    program = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
    return subprocess.run([*program, *words[1:]], stdout=subprocess.DEVNULL).returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run one after another: a clone's studies, and the README's own files."""
    path = tmp_path_factory.mktemp("readme")
    (path / "studies").symlink_to(ROOT / "studies")
    (path / "mymodel.py").write_text(MODEL)
    return path


@pytest.fixture(autouse=True)
def _reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader's machine: the folder, a browser that nobody watches, and a scheduler for Dask."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: None)  # it would wait for Ctrl-C
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("mymodel", None)


def test_the_readme_has_examples() -> None:
    assert (len(PYTHON), len(INSTALL), len(GPU), len(COMMANDS)) == (5, 2, 3, 18)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


def run_block(block: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a block leaves when it is run as a script."""
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)  # where the functions of a script are looked up
    exec(compile(block, "README.md", "exec"), script.__dict__)
    return script.__dict__


@pytest.mark.parametrize("block", [block for block in PYTHON if "ppexec" not in block], ids=lambda block: block[:40])
def test_python_blocks_run(
    block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    scheduler = "tcp://scheduler:8786"
    with contextlib.ExitStack() as held:
        if scheduler in block:
            cluster = held.enter_context(LocalCluster(n_workers=1, processes=False, dashboard_address=None))
            block = block.replace(scheduler, cluster.scheduler_address)
        client = run_block(block, monkeypatch).get("client")
        if client is not None:
            client.close()  # before its scheduler
    assert capsys.readouterr().out


def test_ones_own_schedule_has_a_chart_and_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in PYTHON if "register(" in block)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_block(block, monkeypatch)
    assert "pairwise" in out.getvalue()
    assert "pairwise" in (folder / "mine.html").read_text(encoding="utf-8")
    ppsim.Schedule.from_csv((folder / "mine.csv").read_text()).check()
    assert ppsim_main(["schedule", "--from-csv", "mine.csv"]) == 0


def test_the_executor_is_called_from_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_block(next(block for block in PYTHON if "ppexec.WorkerPool()" in block), monkeypatch)
    assert capsys.readouterr().out == "True\n"


@pytest.mark.timeout(1500)
def test_commands_run_one_after_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """Later ones read what earlier ones wrote."""
    for line in COMMANDS:
        assert run(line, monkeypatch) == 0, f"{line}: {capsys.readouterr().err[-2000:]}"
        assert capsys.readouterr().out or line.startswith("torchrun"), line
    written = {
        "costs.json",
        "predicted.trace",
        "measured.trace",
        "order.csv",
        "checkpoint",
        "shapes.json",
        "machine.json",
    }
    assert written <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("line", GPU)
def test_commands_for_gpus_want_no_more_than_a_gpu(
    line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("tests/ppexec/test_gpu.py and gpucheck run them")
    assert run(line, monkeypatch) == 2
    assert "NVIDIA GPU" in capfd.readouterr().err


def test_ci_runs_the_line_that_installs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "install -q -e '.[test" in ci
    assert "-c constraints.txt" in ci
    assert all("-c constraints.txt" in line for line in INSTALL)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()


def test_the_table_of_schedules_is_what_is_predicted() -> None:
    layers = ppsim.load_costs(ROOT / "studies" / "results" / "equal_layers.json")
    columns = r"^\| `([a-z0-9-]+)`.*?\| (\d+) ms \| ([\d.]+)% \| \d+ ms \([-+]?\d\.\d%\) \| ([\d.]+) MiB \|$"
    rows = re.findall(columns, README, re.MULTILINE)
    assert [row[0] for row in rows] == ppsim.schedule_names()
    for name, step_ms, percent, peak_mib in rows:
        schedule = ppsim.build_schedule(name, ranks=4, microbatches=8)
        trace = ppsim.simulate(schedule, ppsim.partition(layers, stages=schedule.model_stages))
        assert trace.peak_activation_bytes is not None
        said = (
            f"{trace.makespan_s * 1e3:.0f}",
            f"{trace.bubble_fraction:.1%}",
            f"{trace.peak_activation_bytes.max() / 2**20:.2f}",
        )
        assert said == (step_ms, f"{percent}%", peak_mib), name


def test_every_schedule_is_named() -> None:
    assert [name for name in ppsim.schedule_names() if f"`{name}`" not in README] == []


def test_every_study_is_named() -> None:
    studies = ROOT / "studies"
    assert [path.name for path in studies.glob("*.py") if f"`studies/{path.name}`" not in README] == []
