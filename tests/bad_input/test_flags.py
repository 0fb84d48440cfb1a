"""Bad flags: exit code 2, one line on standard error, nothing on standard output, and no file."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import ppexec.cli
import ppsim
import ppsim.cli.main
from ppexec.workers.pool import WorkerPool
from tests.support.primus import write_primus

NO_NUMBER = ["", "x", "True", "nan", "\udcff"]
BAD: dict[str, list[str]] = {
    "count": [*NO_NUMBER, "-1", "1.5", "1e3", "9" * 5000, "9223372036854775808"],
    "count of 1": [*NO_NUMBER, "0", "-1", "1.5", "9" * 400],
    "bytes": [*NO_NUMBER, "-1", "1.5", "9" * 400, "9223372036854775808"],
    "seconds": [*NO_NUMBER, "-1", "inf", "-inf", "1e400", "1e308"],
    "limit": [*NO_NUMBER, "-1", "-inf"],
    "rate": [*NO_NUMBER, "0", "-1", "-inf"],
    "share": [*NO_NUMBER, "0", "-0.5", "1.5", "inf", "1e308"],
    "spread": [*NO_NUMBER, "-1", "inf", "1e308"],
    "name": ["", " ", "nonsense", "\0", "a" * 600, "<script>", "\udcff", "../x"],
    "input": [
        "",
        "nosuch",
        "folder",
        "junk",
        "text.csv",
        "empty.json",
        "list.json",
        "\0",
        "nosuch/x",
        "a" * 300,
        "\ud800",
    ],
    "output": ["", "folder", "nosuch/x", "\0", "\ud800", "a" * 300, "text.csv/x", "."],
    "directory": ["", "\0", "\ud800", "a" * 300, "text.csv", "text.csv/x"],
    "seed": [*NO_NUMBER, "-1", "1.5"],
    "numbers": ["", "x", "1,,2", "1;2", "nan", "-1", ",", "1,"],
    "links": ["", "0", "0-1", "0-0=1", "0-9=2", "0-1=nan", "0-1=-1", "0-1=inf", "0-1=2,0-1=3", "-1-0=2", "a-b=1"],
    "factors": ["", "0", "0=", "9=2", "0=nan", "0=0", "0=-1", "0=inf", "x=2", "0=2,0=3"],
    "word": ["", "nonsense", "None", "\udcff", "a" * 600],
}
_SCHEDULE = {
    "--ranks": "count of 1",
    "--microbatches": "count of 1",
    "--schedule": "name",
    "--stages-per-rank": "count of 1",
}
_LINKS = {"--latency-s": "seconds", "--bytes-per-s": "rate", "--network": "input", "--slow-link": "links"}
_COSTS = {
    **dict.fromkeys(("--forward-s", "--backward-input-s", "--backward-weight-s"), "spread"),
    **dict.fromkeys(("--activation-bytes", "--output-bytes", "--parameter-bytes"), "bytes"),
    "--costs": "input",
}
_HOW = {
    "--overlap": "rate",
    "--scale": "seconds",
    "--dispatch-s": "seconds",
    "--send-s": "seconds",
    "--receive-window": "count of 1",
    "--cores": "count of 1",
    "--devices": "numbers",
    "--sharing": "word",
    "--sharing-efficiency": "share",
    "--speeds": "numbers",
    "--slow-ranks": "factors",
}
_SAMPLES = {
    **dict.fromkeys(("--jitter", "--rank-jitter", "--step-jitter", "--message-jitter"), "spread"),
    "--hiccup-probability": "share",
    "--samples": "count of 1",
    "--seed": "count",
}
_SMALL = ["--schedule", "1f1b", "--ranks", "2", "--microbatches", "4"]
_COMMON = {"--out": "output", "--nonsense": "word"}

_FEW = ["--ranks", "2", "--microbatches", "2"]

_DEVICES = ["--devices", "2", "--global-batch", "4", "--device", "h100"]

Main = Callable[[list[str]], int]
CALLS: list[tuple[str, Main, list[str], dict[str, str]]] = [
    ("schedule", ppsim.cli.main.main, _SMALL, {**_SCHEDULE, "--csv": "output", "--nonsense": "word"}),
    ("schedule", ppsim.cli.main.main, [], {"--from-csv": "input"}),
    (
        "simulate",
        ppsim.cli.main.main,
        [*_SMALL, "--output-bytes", "8", *["--forward-s", "1", "--backward-input-s", "1", "--backward-weight-s", "1"]],
        {**_SCHEDULE, **_LINKS, **_COSTS, **_HOW, **_SAMPLES, **_COMMON, "--engine": "name", "--optimizer": "name"},
    ),
    ("simulate", ppsim.cli.main.main, [*_SMALL, "--costs", "costs.json"], {"--partition": "name"}),
    ("simulate", ppsim.cli.main.main, _SMALL, {"--replicas": "count of 1", "--reduce-latency-s": "name"}),
    (
        "search",
        ppsim.cli.main.main,
        _FEW,
        {
            **_LINKS,
            "--costs": "input",
            "--placement": "word",
            "--objective": "word",
            "--ranks": "count of 1",
            **_COMMON,
        },
    ),
    (
        "search",
        ppsim.cli.main.main,
        _FEW,
        {"--memory-limit-bytes": "limit", "--ranks": "count of 1"},
    ),
    (
        "estimate",
        ppsim.cli.main.main,
        ["--layers", "2", "--hidden", "8", "--heads", "2", "--device", "h100"],
        {
            **dict.fromkeys(("--layers", "--hidden", "--heads", "--seq", "--micro-batch-size", "--tp"), "count of 1"),
            **dict.fromkeys(("--efficiency", "--bandwidth-efficiency"), "share"),
            "--launch-s": "seconds",
            "--device": "name",
            "--recompute": "word",
            "--vocabulary": "count of 1",
            "--dtype-bytes": "count of 1",
            **_COMMON,
        },
    ),
    ("estimate", ppsim.cli.main.main, ["--device", "h100"], {"--huggingface": "input"}),
    (
        "explore",
        ppsim.cli.main.main,
        ["--no-browser", "--port", "0", *_SMALL],
        {**_SCHEDULE, "--port": "count", "--run": "input", "--nonsense": "word"},
    ),
    (
        "plan",
        ppsim.cli.main.main,
        ["--layers", "2", "--hidden", "8", "--heads", "2", "--seq", "8", *_DEVICES],
        {
            **dict.fromkeys(("--layers", "--hidden", "--heads", "--seq", "--vocabulary"), "count of 1"),
            **dict.fromkeys(("--devices", "--global-batch", "--devices-per-node", "--keep"), "count of 1"),
            **dict.fromkeys(("--device", "--schedules"), "name"),
            **dict.fromkeys(("--machine", "--huggingface"), "input"),
            **dict.fromkeys(("--csv", "--table", "--figure"), "output"),
            "--memory-gb": "rate",
            "--nonsense": "word",
        },
    ),
    (
        "advise",
        ppsim.cli.main.main,
        ["measured", "--no-search"],
        {
            **dict.fromkeys(("--format", "--choose", "--nonsense"), "word"),
            "--memory-limit-bytes": "limit",
            "--csv": "output",
            "--out": "directory",
        },
    ),
    ("import", ppsim.cli.main.main, ["measured"], {"--format": "word", "--out": "directory"}),
    (
        "simulate",
        ppsim.cli.main.main,
        [*_SMALL, "--costs", "costs.json"],
        {"--layout": "name", "--streams": "word"},
    ),
    ("attribute", ppsim.cli.main.main, ["step.trace"], {"--costs": "input", "--nonsense": "word"}),
    (
        "run",
        ppexec.cli.main,
        [],
        {
            **dict.fromkeys(("--layers", "--dp", "--tp", "--steps", "--stages-per-rank"), "count of 1"),
            **dict.fromkeys(("--hidden", "--seq", "--micro-batch-size", "--microbatches", "--ranks"), "count"),
            **dict.fromkeys(("--intermediate", "--threads", "--warmup", "--receive-window", "--heads"), "count"),
            **dict.fromkeys(("--global-batch-size", "--vocabulary"), "count"),
            **dict.fromkeys(("--model", "--schedule", "--partition"), "name"),
            **dict.fromkeys(("--preset", "--dtype", "--backend", "--device", "--devices", "--compute"), "word"),
            **dict.fromkeys(("--from-csv", "--costs", "--text"), "input"),
            "--timeout-s": "rate",
            "--learning-rate": "spread",
            "--dropout": "spread",
            **_COMMON,
        },
    ),
    (
        "train",
        ppexec.cli.main,
        ["--ranks", "2"],
        {
            **dict.fromkeys(("--accumulate", "--evaluate-steps", "--steps"), "count of 1"),
            **dict.fromkeys(("--evaluate-every", "--learning-rate-warmup", "--learning-rate-decay-steps"), "count"),
            **dict.fromkeys(("--learning-rate", "--weight-decay", "--min-learning-rate"), "spread"),
            **dict.fromkeys(("--learning-rate-decay", "--nonsense"), "word"),
            "--clip-norm": "rate",
            "--resume": "input",
            "--save": "directory",
        },
    ),
    ("verify", ppexec.cli.main, ["--ranks", "2"], {"--schedule": "name", "--dp": "count of 1", "--nonsense": "word"}),
    ("profile", ppexec.cli.main, ["--ranks", "2"], {"--layers": "count of 1", "--hidden": "count", **_COMMON}),
]
_STUDIES: dict[str, dict[str, str]] = {
    "afab_bubble": {
        **dict.fromkeys(("--ranks", "--microbatches", "--steps"), "count of 1"),
        **dict.fromkeys(("--forward-s", "--backward-s"), "seconds"),
        "--message-bytes": "bytes",
    },
    "benchmarks": {"--only": "word", "--turns": "count of 1"},
    "executor_overhead": dict.fromkeys(("--layers", "--steps"), "count of 1"),
    "fidelity": {
        "--schedules": "word",
        **dict.fromkeys(("--ranks", "--repeats"), "count of 1"),
        "--steps": "count",
        "--limit-s": "spread",
    },
    "link": dict.fromkeys(("--ranks", "--sizes", "--rounds", "--pieces"), "count of 1"),
    "partition": {"--partition": "name", "--max-cuts": "count"},
    "published": {"--search": "word"},
    "schedules": {"--only": "word", "--ranks": "count", "--compute": "word"},
    "sim_vs_measured": {"--steps": "count of 1", "--costs": "input"},
    "soak": {"--minutes": "seconds", **dict.fromkeys(("--rounds", "--first"), "count"), "--seed": "seed"},
    "train": {"--meshes": "name", "--steps": "count of 1"},
}


def _study(name: str) -> Main:
    def main(words: list[str]) -> int:
        with mock.patch.object(sys, "argv", [f"{name}.py", *words[1:]]):
            return int(importlib.import_module(f"studies.{name}").main())

    return main


CALLS += [
    (name, _study(name), [], {**kinds, "--out": "directory", "--nonsense": "word"}) for name, kinds in _STUDIES.items()
]


def _cases() -> list[Any]:
    return [
        pytest.param(main, [command, *_without(given, flag), flag, word], id=f"{command}{flag}-{number}")
        for command, main, given, kinds in CALLS
        for flag, kind in kinds.items()
        for number, word in enumerate(BAD[kind])
    ]


def _without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag) if flag in words else len(words)
    return words[:at] + words[at + 2 :]


def _started(pool: WorkerPool) -> None:
    raise AssertionError("nothing was refused, and a run began")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of each wrong kind, and some good ones."""
    path = tmp_path_factory.mktemp("files")
    (path / "junk").write_bytes(b"\x00\xff\xfe" * 50)
    (path / "text.csv").write_text("hello\nworld\n")
    (path / "empty.json").write_text("")
    (path / "list.json").write_text("[1, 2]")
    (path / "folder").mkdir()
    layer = ppsim.LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    ppsim.save_costs([layer] * 4, path / "costs.json")
    schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=4)
    step = ppsim.simulate(schedule, [ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)] * 2)
    step.save(path / "step.trace")
    write_primus([step, step], path / "measured", behind_s=[0.0, 1.0])
    return path


@pytest.mark.one_in(4)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("main", "words"), _cases())
def test_bad_flags_are_refused(
    main: Main, words: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(WorkerPool, "__init__", _started)
    before = {each.name: each.stat().st_mtime_ns for each in directory.iterdir()}
    assert main(words) == 2, capsys.readouterr()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(r"(ppsim|ppexec|\w+\.py): \S", err)
    assert len(err) < 1000
    flag, word = words[-2:]
    names = (flag, flag.strip("-").replace("-", "_"), word, repr(word)[1:40], "than a float holds", "must be seconds")
    assert any(name in err for name in names), err
    assert {each.name: each.stat().st_mtime_ns for each in directory.iterdir()} == before
