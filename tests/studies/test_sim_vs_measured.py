"""The study of prediction against measurement: its files say what they promise."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pandas
import pytest

import ppsim
from ppexec.experiment.experiment import Outcome
from ppsim.simulation.timed_program import row_durations
from tests.support.studies import load

_FLAGS = "--layers 4 --hidden 16 --seq 4 --micro-batch-size 1 --microbatches 5 --threads 1 --steps 3 --warmup 1"
TINY = _FLAGS.split()


pytestmark = pytest.mark.xdist_group("sim_vs_measured")  # the study runs once


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load("sim_vs_measured")


def call(study: ModuleType, words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the study under these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sim_vs_measured.py", *words])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = study.main()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def answer(study: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The directory of a tiny run, what it printed, and what it said meanwhile."""
    directory = tmp_path_factory.mktemp("study") / "new" / "directory"
    code, out, err = call(study, [*TINY, "--json", "--out", str(directory)])
    assert code == 0, err
    (line,) = out.splitlines()
    return directory, json.loads(line), err


def test_the_summary_has_every_promised_key(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, printed, _ = answer
    summary = json.loads((directory / "summary.json").read_text())
    assert summary == printed
    step = summary["step_time_s"]
    assert step["predicted"] > 0
    assert 0 < step["measured_p25"] <= step["measured_median"] <= step["measured_p75"]
    assert sorted(step["measured"])[1] == step["measured_median"]
    assert step["relative_error"] == pytest.approx(step["predicted"] / step["measured_median"] - 1)
    assert all(0 <= summary["bubble_fraction"][clock] < 1 for clock in ("predicted", "measured"))
    assert summary["gradients"] == {"bit_equal": True, "max_abs_diff": 0}
    assert summary["outputs"] == {"bit_equal": True, "max_abs_diff": 0}
    assert summary["first_difference"] is None
    assert (summary["config"]["layers"], summary["config"]["microbatches"]) == (4, 5)
    assert summary["environment"]["processes"] == 2
    assert "torch" in summary["environment"]


def test_activation_bytes_agree_exactly(answer: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, _ = answer
    held = summary["activation_bytes"]
    block_bytes = 4 * 4 * (16 + 2 * 64)  # 4 positions of 4 bytes: a block's input, and both sides of its activation
    assert held["predicted"] == held["measured"] == [5 * (2 * block_bytes + 4 * 4 * 16)] * 2


def test_every_column_of_memory_agrees_after_every_action(answer: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, _ = answer
    memory = summary["memory"]
    assert memory["equal_at_every_action"] is True
    assert memory["first_difference"] is None
    parameters = 2 * 4 * (2 * 16 * 64 + 16 + 64)
    for clock in ("predicted", "measured"):
        held = memory[clock]
        assert held["activation_bytes"] == summary["activation_bytes"][clock]
        assert held["parameter_bytes"] == held["gradient_bytes"] == [parameters] * 2
        assert all(bytes_held > 0 and bytes_held % 256 == 0 for bytes_held in held["receive_buffer_bytes"])
        for rank in range(2):
            assert held["total_bytes"][rank] > parameters + held["activation_bytes"][rank]


def test_events_are_those_of_both_clocks(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, summary, _ = answer
    events = pandas.read_csv(directory / "events.csv")
    assert {"clock", "rank", "stage", "kind", "microbatch", "start_s", "end_s"} <= set(events.columns)
    assert set(events["clock"]) == {"predicted", "measured"}
    for _, of_clock in events.groupby("clock"):
        counts = of_clock["kind"].value_counts().to_dict()
        assert counts == {"F": 10, "B": 10, "SEND_F": 5, "RECV_F": 5, "SEND_B": 5, "RECV_B": 5}
    assert (events["end_s"] >= events["start_s"]).all()
    compute = events[(events["clock"] == "predicted") & events["kind"].isin(["F", "B"])]
    span_s = compute["end_s"].max() - compute["start_s"].min()
    assert span_s == pytest.approx(summary["step_time_s"]["predicted"])


def test_the_picture_shows_the_prediction_above_the_measured_step(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, summary, _ = answer
    picture = ElementTree.fromstring((directory / "picture.svg").read_text(encoding="utf-8"))
    bars = [each for each in picture.iter("{http://www.w3.org/2000/svg}rect") if each.get("height") == "16"]
    assert len(bars) == 2 * (20 + 2)  # computations, and what is idle behind each lane
    texts = "\n".join(each.text or "" for each in picture.iter("{http://www.w3.org/2000/svg}text"))
    step_s = summary["step_time_s"]
    words = r"Predicted: ([\d.]+) ms, bubble [\d.]+%.*Measured, median step: ([\d.]+) ms"
    found = re.search(words, texts, re.DOTALL)
    assert found is not None
    assert float(found[1]) == pytest.approx(step_s["predicted"] * 1e3, rel=1e-3)
    assert float(found[2]) == pytest.approx(step_s["measured_median"] * 1e3, rel=1e-3)


def test_the_trace_is_one_that_perfetto_opens(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, _, _ = answer
    document = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))
    events = document["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"predicted rank 0", "predicted rank 1", "measured rank 0", "measured rank 1"}
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)
    assert sum(event["cat"] == "compute" for event in slices) == 2 * 20


def test_both_steps_are_there_to_be_compared(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, summary, _ = answer
    predicted, measured = (ppsim.Trace.load(directory / f"{name}.trace.npz") for name in ("predicted", "measured"))
    assert predicted.makespan_s == summary["step_time_s"]["predicted"]
    assert measured.makespan_s == summary["step_time_s"]["measured_median"]
    assert (predicted.clock, measured.clock) == ("simulated", "measured")
    assert predicted.details["config"] == measured.details["config"] == summary["config"]
    assert predicted.conditions.overlap == 1.0  # what the prediction was made with
    found = ppsim.compare(predicted, measured)
    assert found.difference_s == measured.makespan_s - predicted.makespan_s


def test_the_report_needs_no_network(answer: tuple[Path, dict[str, Any], str]) -> None:
    directory, _, _ = answer
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    outside_of_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside_of_scripts)
    assert not re.search(r"<script[^>]+src|<link|@import|url\((?!data:)", outside_of_scripts + page[:2000])
    assert "default-src 'none'" in page
    for heading in (
        "Predicted against measured",
        "Timelines",
        "Activation memory",
        "Memory in all",
        "Bubbles",
        "Environment",
    ):
        assert heading in outside_of_scripts


def test_progress_goes_to_standard_error(answer: tuple[Path, dict[str, Any], str]) -> None:
    _, _, err = answer
    assert "afab: 2 ranks" in err
    assert "Traceback" not in err


def test_the_table_is_short_and_says_what_was_found(study: ModuleType, tmp_path: Path) -> None:
    words = [*TINY, "--schedule", "afab-eager", "--out", str(tmp_path / "a")]
    code, out, _ = call(study, words)
    assert code == 0
    lines = out.splitlines()
    assert re.search(r"\d %|\d%", lines[0])  # the conclusion, with its number
    assert lines[2] == "afab-eager: 2 ranks, 2 stages, 5 microbatches"
    for row in ("step time", "bubble fraction", "activations, rank 0", "activations, rank 1"):
        assert any(line.startswith(row) for line in lines)
    assert sum("equal" in line.split() for line in lines if line.startswith("activations")) == 2
    assert "Outputs and gradients are bit-equal to those of one process without a pipeline." in out


def test_timed_compute_without_costs_is_profiled_first(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to end with "timed compute needs costs", though `ppexec run` profiles then.

    Measured actions are held against the profile's costs, not against predicted ones: these are sometimes late too.
    """
    outcomes: list[Outcome] = []
    original = study.predict_and_measure
    monkeypatch.setattr(
        study, "predict_and_measure", lambda *args, **named: outcomes.append(original(*args, **named)) or outcomes[0]
    )
    code, out, err = call(study, [*TINY, "--compute", "timed", "--json", "--out", str(tmp_path)])
    assert code == 0, err
    summary = json.loads(out)
    assert summary["gradients"] is None
    measured = ppsim.Trace.load(tmp_path / "measured.trace.npz")
    stated_s = row_durations(measured.program, outcomes[0].stages)
    assert (stated_s > 0).all()
    assert (measured.end_s - measured.start_s >= 0.999 * stated_s).all()


def test_an_evaluation_is_studied_too(study: ModuleType, tmp_path: Path) -> None:
    code, out, err = call(study, [*TINY, "--forward-only", "--json", "--out", str(tmp_path)])
    assert code == 0, err
    summary = json.loads(out)
    assert summary["gradients"] is None
    assert summary["outputs"]["bit_equal"] is True
    assert summary["activation_bytes"] == {"predicted": [0, 0], "measured": [0, 0]}


def test_offloaded_and_sharded_steps_are_studied_too(study: ModuleType, tmp_path: Path) -> None:
    built = ppsim.build_schedule("1f1b", ranks=2, microbatches=5).with_recompute(share=0.5).with_offload()
    (tmp_path / "moved.csv").write_text(built.to_csv(offload=True))
    flags = [*TINY, "--from-csv", str(tmp_path / "moved.csv"), "--dp", "2", "--shard", "1"]
    code, out, err = call(study, [*flags, "--json", "--out", str(tmp_path)])
    assert code == 0, err
    summary = json.loads(out)
    assert summary["memory"]["equal_at_every_action"]
    assert all(max(summary["memory"]["predicted"][name]) > 0 for name in ("unsharded_bytes", "host_bytes"))
    assert summary["host_link"]["latency_s"] >= 0
    assert len(summary["collectives"]["unshard_s"]) == 2
    page = (tmp_path / "report.html").read_text()
    for said in ("Copies of activations to host memory", "R (ms)", "in host memory (MiB)", "whole parameters (MiB)"):
        assert said in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 7", "7 layers do not divide evenly over 2 stages"),
        ("--steps 0", "steps must be a whole number of 1 or more"),
        ("--schedule nonsense", "unknown schedule 'nonsense'"),
        ("--out FILE", "is not a directory"),
        ("--nonsense", "--nonsense"),
        ("--costs missing.json", "cannot open 'missing.json'"),
    ],
)
def test_bad_flags_are_one_message_and_exit_code_2(
    study: ModuleType, flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("in the way")
    code, out, err = call(study, flags.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("sim_vs_measured.py: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_the_docstring_holds_question_command_and_answer(study: ModuleType) -> None:
    assert study.__doc__ is not None
    for word in ("Question ", "Command ", "Answer "):
        assert f"\n{word}" in study.__doc__
