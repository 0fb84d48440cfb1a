"""Security: files hold data and never code, nobody outside this machine is listened to, and names are text."""

from __future__ import annotations

import ast
import contextlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

import ppexec.cli
import ppsim
from ppexec.workers.pool import WorkerPool
from ppsim import InputError, StageCost, Trace
from ppsim.cli.main import main
from ppsim.export.html_report import Report
from ppsim.plots.accuracy_figure import accuracy, errors
from ppsim.plots.attribution_figure import attribution
from ppsim.plots.bubble_figure import bubbles
from ppsim.plots.cuts_figure import layer_times, steps_by_turn
from ppsim.plots.loss_figure import loss_curves
from ppsim.plots.memory_figure import memory
from ppsim.plots.memory_parts_figure import memory_parts
from ppsim.plots.step_times_figure import step_times
from ppsim.plots.timeline_figure import timeline
from ppsim.plots.trade_off_figure import memory_against_bubble
from tests.support.remote import tiny

ROOT = Path(__file__).parents[1]
SOURCES = [path for name in ("ppsim", "ppexec", "studies") for path in sorted((ROOT / name).rglob("*.py"))]
# A sweep's function goes to its own worker processes through their pipe; it is read from no file.
PICKLES = {ROOT / "ppsim/parameter_sweep/worker.py"}


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_becomes_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, call in _calls(tree):
        where = f"{path}:{call.lineno}: {ast.unparse(call)}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("eval", "exec", "compile", "__import__"), where
        assert name.rpartition(".")[2] not in ("Unpickler", "read_pickle"), where
        if name.rpartition(".")[0] in ("pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib"):
            assert not name.endswith(("load", "loads", "open")) or path in PICKLES, where
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", where
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
        # PyTorch's own reader of checkpoints unpickles: ppexec/training/stored.py has one that does not.
        assert name.rpartition(".")[2] != "FileSystemReader", where
        if name == "dcp.load":
            assert given.get("storage_reader") == "reader", where
        if name.endswith("import_module"):  # --model package.module:factory alone
            assert path == ROOT / "ppexec/models/load.py", where
        assert given.get("shell", "False") == "False", where
        assert name not in ("os.system", "os.popen"), where


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "code in a file ran"))


@pytest.mark.parametrize("name", ["x.trace", "x.csv", "x.json", "x.sqlite"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readers: dict[str, Callable[[Path], Any]] = {"x.trace": Trace.load, "x.sqlite": ppsim.load_sweep}
    array = io.BytesIO()
    np.savez(array, header=np.array([_Bomb()], dtype=object), allow_pickle=True)
    for content in (pickle.dumps(_Bomb()), array.getvalue()):
        Path(name).write_bytes(content)
        with pytest.raises(InputError):
            readers.get(name, ppsim.load_costs)(Path(name))
    assert not Path("exploded").exists()
    pickle.loads(pickle.dumps(_Bomb()))  # which is what would have happened
    assert Path("exploded").exists()


def test_the_help_says_that_a_model_is_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ppexec.cli.main(["run", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "package.module:factory, which is imported and run" in said


def listeners() -> list[str]:
    """The addresses at which this process takes connections, as the kernel spells them."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(link.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].rpartition(":")[0])
    return found


def worker_listeners(worker: Any) -> list[str]:
    """As `listeners`, in a worker that has talked to the others."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    return listeners()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_else_is_listened_to() -> None:
    """Cause of a bug: given a port, PyTorch's store listens at every address of the machine."""
    before = len(listeners())
    with contextlib.closing(WorkerPool()) as pool:
        pool.set_up(tiny(ranks=2))
        here = listeners()
        there = [address for found in pool.call(2, worker_listeners) for address in found]
    assert len(here) > before
    assert there  # gloo's
    assert set(here[before:]) | set(there) <= {"0100007F", "00000000000000000000000001000000"}


NAME = '<script>alert(1)</script><img src=x onerror="alert(2)">'
COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8, output_bytes=8)
TRACE = ppsim.simulate(replace(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), name=NAME), [COST] * 2)
STEPS = ppsim.monte_carlo(TRACE.schedule, [COST] * 2, jitter=ppsim.Jitter(action=0.1), samples=20, engine="simpy")
_BOTH = {"predicted": 1.0, "measured": 2.0}
FIGURES: dict[str, Callable[[], go.Figure]] = {
    "timeline": lambda: timeline({NAME: TRACE}, title=NAME),
    "memory": lambda: memory({NAME: TRACE}, title=NAME),
    "memory parts": lambda: memory_parts({NAME: TRACE}, title=NAME),
    "bubbles": lambda: bubbles({NAME: TRACE}, title=NAME),
    "attribution": lambda: attribution({NAME: TRACE}, title=NAME),
    "step times": lambda: step_times({NAME: STEPS}, title=NAME),
    "accuracy": lambda: accuracy({NAME: [(1.0, 1.1)]}, labels={NAME: [NAME]}),
    "errors": lambda: errors({NAME: [(1.0, 1.1), (2.0, 2.1)]}),
    "layers": lambda: layer_times({NAME: 1.0}),
    "cuts": lambda: steps_by_turn({NAME: (1.0, np.array([1.0, 1.1]))}),
    "trade-off": lambda: memory_against_bubble(
        [{"schedule": NAME, "peak_activation_bytes": _BOTH, "bubble_fraction": _BOTH}]
    ),
    "losses": lambda: loss_curves([1.0, 0.5], {NAME: [1.0, 0.5]}, allowed=[0.1, 0.1]),
}
_UNSEEN = ("legendgroup", "alignmentgroup", "offsetgroup", "meta")  # how plotly tells traces apart


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in _UNSEEN:
                yield from _texts(part)
    elif isinstance(value, list | tuple | np.ndarray):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_text_in_figures_and_in_their_pages(name: str) -> None:
    figure = FIGURES[name]()
    texts = list(_texts(figure.to_dict()))
    assert any("alert" in text for text in texts)
    for text in texts:
        assert "<script" not in text, text
        assert "<img" not in text, text
    page = Report(title=NAME, subtitle=NAME, lead=NAME, facts={NAME: NAME}).add(
        NAME, text=NAME, table=[{NAME: NAME}], definitions={NAME: NAME}, figure=figure, caption=NAME
    )
    html = page.to_html()
    assert "<script>alert" not in html
    assert "<img src" not in html


def test_names_of_files_are_text_on_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of a file cannot tell a terminal what to do."""
    path = tmp_path / "\x1b[31mred.csv"
    path.write_text("0F0,0B0")
    assert main(["schedule", "--from-csv", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    path.write_text("no action")
    assert main(["schedule", "--from-csv", str(path)]) == 2
    assert "\x1b" not in capsys.readouterr().err
