"""The command `ppsim plan`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ppsim import Schedule, named_machine
from ppsim.cli.main import main

MODEL = ["--layers", "24", "--hidden", "2048", "--heads", "16", "--vocabulary", "51200"]
JOB = [*MODEL, "--devices", "16", "--global-batch", "64", "--seq", "2048", "--schedules", "1f1b,zb-v", "--keep", "3"]


def test_context_parallel_ranks_are_chosen_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--devices", "4", "--global-batch", "8", "--seq", "8192"]
    words = ["plan", "--layers", "4", "--hidden", "512", "--heads", "8", "--device", "h100", *job]
    assert main([*words, "--cp", "2", "--json"]) == 0
    assert all(row["cp"] == 2 for row in json.loads(capsys.readouterr().out)["ranked"])
    for given, said in (("2,", "must be whole numbers with commas"), ("0", "cp[0] must be a whole number of 1")):
        assert main([*words, "--cp", given]) == 2
        assert said in capsys.readouterr().err
    assert main([*words, "--cp", "2"]) == 0
    assert "cp" in capsys.readouterr().out.splitlines()[2].split()
    assert main(words) == 0
    assert "cp" not in capsys.readouterr().out.splitlines()[2].split()


def test_plans_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("csv", "csv"), ("table", "csv"), ("figure", "html"))}
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["plan", *JOB, "--device", "a100", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    best = document["best"]
    assert best["step_s"] == document["ranked"][0]["step_s"] == min(each["step_s"] for each in document["ranked"])
    assert len(document["losers"]) + 1 == document["considered"]
    assert sum(best["parts_s"].values()) == pytest.approx(best["step_s"])
    assert sum(best["blocks"]) == 24
    assert Schedule.from_csv(files["csv"].read_text()).ranks == best["pp"]
    assert len(list(csv.DictReader(files["table"].open()))) == document["considered"]
    assert "nothing is better in both" in files["figure"].read_text()
    assert main(["plan", *JOB, "--device", "a100"]) == 0
    said = capsys.readouterr().out
    assert f"{document['considered']} plans considered" in said
    assert "ruled out by a bound, the fastest:" in said


def test_rows_can_be_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Cause: plans that differ in their cut alone stood as equal rows, and what does not fit was listed twice."""
    model = ["--layers", "30", "--hidden", "2048", "--heads", "16", "--vocabulary", "151936"]
    job = ["--device", "a100", "--devices", "8", "--global-batch", "64", "--seq", "2048", "--memory-gb", "12"]
    assert main(["plan", *model, *job, "--schedules", "1f1b", "--keep", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[2 : lines.index("", 2)]
    columns = table[0].split()
    assert columns[columns.index("recompute") + 1] == "layout"
    chosen = [tuple(row.split()[: columns.index("layout") + 1]) for row in table[1:]]
    assert len(set(chosen)) == len(chosen) < len(table)
    assert "do not fit, the smallest:" in lines
    losers = [line for line in lines if line.startswith("  tp ")]
    assert len(set(losers)) == len(losers) > 0


def test_a_fitted_machine_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    named_machine("a100").save(path)
    seconds = []
    for source in (["--machine", str(path)], ["--device", "a100"]):
        assert main(["plan", *JOB, *source, "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["best"]["step_s"])
    assert seconds[0] == seconds[1]


def test_torchtitans_flags_name_the_file_that_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cause of a bug: they named schedule.csv whatever --csv said."""
    path = tmp_path / "mine.csv"
    job = ["plan", *JOB[:-4], "--schedules", "zb-h1", "--keep", "1", "--device", "a100", "--memory-gb", "18"]
    assert main([*job, "--csv", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"--parallelism.pipeline_parallel_schedule_csv {path}" in said
    assert Schedule.from_csv(path.read_text()).ranks > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --device NAME or --machine FILE, one of them"),
        (["--device", "a100", "--machine", "x.json"], "one of them"),
        (["--device", "a100", "--memory-gb", "-1"], "--memory-gb must be finite and above 0"),
        (["--device", "a100", "--memory-gb", "1e300"], "--memory-gb must be finite and above 0, got 1e+300"),
        (["--device", "a100", "--memory-gb", "3"], "plans fits 3.0 GB"),
        (["--device", "tpu"], "unknown machine 'tpu'"),
    ],
)
def test_bad_input_is_said(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *JOB, *flags]) == 2
    assert message in capsys.readouterr().err
