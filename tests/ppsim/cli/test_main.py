"""The command line: what it prints, to whom, and how fast it can say what it offers."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ppsim import (
    Conditions,
    LayerCost,
    Network,
    Schedule,
    StageCost,
    Trace,
    build_schedule,
    load_costs,
    partition,
    save_costs,
    schedule_names,
    simulate,
)
from ppsim.cli.main import main
from tests.support.commandline import AFAB, COSTS, refused, run, run_json

_SCHEDULE_KEYS = {"name", "ranks", "stages", "microbatches", "placement"}


def test_schedule_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "schedule", AFAB) == {
        "name": "afab",
        "ranks": 3,
        "stages": 3,
        "copies": 1,
        "microbatches": 4,
        "placement": [0, 1, 2],
        "is_forward_only": False,
        "actions": 24,
        "messages": 16,
        "links": 4,
        "receive_window": 1,
        "checked": True,
    }


def test_schedule_text_draws_the_staircase(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "schedule --schedule gpipe --ranks 2 --microbatches 2")
    assert (code, err) == (0, "")
    assert out.startswith("afab: 2 ranks, 2 stages, 2 microbatches\n")
    assert "rank 0  F0 F1  .  .  . B0 B0 B1 B1\nrank 1     F0 F1 B0 B0 B1 B1\n" in out
    assert "makespan 9, bubble 33.3%, activations held at most per rank: 2 2" in out


@pytest.mark.parametrize("size", ["--ranks 65 --microbatches 1", "--ranks 2 --microbatches 300"])
def test_what_is_too_large_to_read_is_not_drawn(capsys: pytest.CaptureFixture[str], size: str) -> None:
    code, out, _ = run(capsys, f"schedule --schedule afab {size}")
    assert code == 0
    assert "not drawn" in out
    assert "\nrank 0" not in out


def test_schedule_csv_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_json(capsys, "schedule", AFAB, f"--csv {tmp_path}/s.csv")["checked"]
    schedule = build_schedule("afab", ranks=3, microbatches=4)
    assert (tmp_path / "s.csv").read_text() == schedule.to_csv()
    again = run_json(capsys, f"schedule --from-csv {tmp_path}/s.csv")
    assert {**again, "name": "afab"} == run_json(capsys, "schedule", AFAB)
    assert again["name"] == "s.csv"


def test_simulate_json_is_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--activation-bytes 7 --output-bytes 100 --latency-s 0.25 --bytes-per-s 50 --overlap 0.5"
    printed = run_json(capsys, "simulate", AFAB, COSTS, flags)
    cost = StageCost(forward_s=1, backward_input_s=0.75, backward_weight_s=0.5, activation_bytes=7, output_bytes=100)
    network = Network(latency_s=0.25, bytes_per_s=50)
    trace = simulate(build_schedule("afab", ranks=3, microbatches=4), [cost] * 3, network=network, overlap=0.5)
    assert printed["makespan_s"] == trace.makespan_s
    assert printed["bubble_fraction"] == trace.bubble_fraction
    for name in ("bubble_s", "rank_time_s", "compute_s", "peak_activation_bytes"):
        assert printed[name] == getattr(trace, name).tolist()
    assert printed["conditions"]["overlap"] == 0.5
    assert printed.keys() >= _SCHEDULE_KEYS
    assert (printed["name"], printed["placement"]) == ("afab", [0, 1, 2])


@pytest.mark.parametrize("subcommand", [f"simulate {AFAB}", "search --ranks 3 --microbatches 4"])
def test_a_network_file_is_the_network_that_flags_spell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, subcommand: str
) -> None:
    Network(latency_s=0.25, bytes_per_s=50).to_file(tmp_path / "n.json")
    words = (subcommand, COSTS, "--output-bytes 100")
    by_flags = run_json(capsys, *words, "--latency-s 0.25 --bytes-per-s 50")
    assert run_json(capsys, *words, f"--network {tmp_path}/n.json") == by_flags
    assert run_json(capsys, *words)["makespan_s"] < by_flags["makespan_s"]


def test_simulate_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys,
        "simulate --schedule afab --ranks 2 --microbatches 8 --forward-s 1 --backward-s 2 --activation-bytes 1000",
    )
    assert (code, err) == (0, "")
    assert out == (
        "afab: 2 ranks, 2 stages, 8 microbatches\n"
        "makespan         27 s\n"
        "bubble fraction  11.11%\n"
        "\n"
        "rank  rank time (s)  compute (s)  bubble (s)  peak activations (bytes)\n"
        "   0             27           24           3                     8,000\n"
        "   1             24           24           3                     8,000\n"
    )


@pytest.mark.parametrize(
    ("costs", "makespan_s"),
    [
        ("--forward-s 1 --backward-s 2", 18),
        ("--forward-s 1 --backward-input-s 1 --backward-weight-s 1", 18),
        ("--forward-s 1 --backward-input-s 5 --backward-weight-s 5 --backward-s 2", 18),
        ("--forward-s 1 --forward-only", 6),
    ],
)
def test_only_costs_that_some_action_takes_are_asked_for(
    capsys: pytest.CaptureFixture[str], costs: str, makespan_s: float
) -> None:
    assert run_json(capsys, "simulate", AFAB, costs)["makespan_s"] == makespan_s


def test_a_split_backward_needs_both_halves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("0F0,0I0,0W0\n")
    split = f"simulate --from-csv {tmp_path}/split.csv"
    assert "--backward-input-s is missing" in refused(capsys, split, "--forward-s 1 --backward-s 2")
    assert run_json(capsys, split, COSTS)["makespan_s"] == 2.25


def test_simulate_from_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layers = [
        LayerCost(forward_s=s, backward_input_s=s, backward_weight_s=s, activation_bytes=9) for s in (1, 1, 1, 4, 1, 1)
    ]
    save_costs(layers, tmp_path / "c.json")
    makespans = {}
    for flag, method in [("even", "even"), ("optimal", "optimal"), ("3,2,1", [3, 2, 1])]:
        printed = run_json(capsys, "simulate", AFAB, f"--costs {tmp_path}/c.json --partition {flag}")
        stages = partition(load_costs(tmp_path / "c.json"), stages=3, method=method)
        trace = simulate(build_schedule("afab", ranks=3, microbatches=4), stages)
        assert printed["makespan_s"] == trace.makespan_s
        assert printed["peak_activation_bytes"] == trace.peak_activation_bytes.tolist()
        makespans[flag] = trace.makespan_s
    assert makespans["optimal"] < makespans["even"]
    assert run_json(capsys, "simulate", AFAB, f"--costs {tmp_path}/c.json")["makespan_s"] == makespans["even"]


def test_simulate_writes_its_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = run_json(capsys, "simulate", AFAB, COSTS, f"--out {tmp_path}/t.trace")
    trace = Trace.load(tmp_path / "t.trace")
    assert trace.makespan_s == printed["makespan_s"]
    run_json(capsys, "simulate", AFAB, COSTS, f"--out {tmp_path}/t.csv")
    assert (tmp_path / "t.csv").read_text() == trace.to_frame().to_csv(index=False)
    run_json(capsys, "simulate", AFAB, COSTS, f"--out {tmp_path}/t.json")
    run_json(capsys, "simulate", AFAB, COSTS, f"--out {tmp_path}/t.json.gz")
    content = (tmp_path / "t.json").read_bytes()
    assert gzip.decompress((tmp_path / "t.json.gz").read_bytes()) == content
    assert len([event for event in json.loads(content)["traceEvents"] if event.get("ph") == "s"]) == 16  # messages


def test_simulate_reads_a_schedule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schedule = Schedule.of([["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"]])
    (tmp_path / "s.csv").write_text(schedule.to_csv())
    printed = run_json(capsys, f"simulate --from-csv {tmp_path}/s.csv --overlap 0.5", COSTS)
    assert printed["makespan_s"] == 2 + 0.5 * 2.25 + 2 * 1.25


def _subprocess(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_help_needs_no_heavy_library() -> None:
    """Seconds of imports would be the price of every --help."""
    code = """if True:
        import sys
        from ppsim.cli.main import main
        assert main(["simulate", "--help"]) == 0
        heavy = {"torch", "pandas", "plotly", "numba", "scipy", "matplotlib"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """
    done = _subprocess(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--backward-weight-s" in done.stdout


def test_help_has_every_flag_with_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help-all"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in ("latency-s", "bytes-per-s", "overlap", "partition", "engine", "out", "json", "stages-per-rank"):
        assert f"--{flag}" in printed
    assert "in bytes per second (default: no limit)" in printed
    assert f"Built-in schedule: {schedule_names()[0]}, " in printed
    assert "{None}" not in printed


@pytest.mark.parametrize("words", ["schedule --schedule afab --ranks 64 --microbatches 64", "simulate --help"])
def test_a_reader_that_stops_is_no_error(words: str) -> None:
    """Cause of a bug in many tools: Python's last flush prints a traceback into `| head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from ppsim.cli.main import main; sys.exit(main())", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_message() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from ppsim.cli.main import main; sys.exit(main())",
                "schedule",
                *AFAB.split(),
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "ppsim: cannot read or write: No space left on device\n")


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_closed_standard_output_is_no_error() -> None:
    """Cause of a bug: sys.stdout is None then, which tyro does not expect."""
    command = f"'{sys.executable}' -c 'import sys; from ppsim.cli.main import main; sys.exit(main())' --help >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_costs_every_action_takes_a_second(capsys) -> None:
    found = run_json(capsys, "simulate --schedule afab --ranks 4 --microbatches 8")
    assert found["makespan_s"] == (8 + 4 - 1) * 3


def test_search_reports_the_best_order_found_and_what_no_order_beats(capsys, tmp_path) -> None:
    path = tmp_path / "found.csv"
    costs = "--forward-s 1 --backward-input-s 1 --backward-weight-s 1 --activation-bytes 1 --memory-limit-bytes 3"
    found = run_json(capsys, f"search --ranks 3 --microbatches 6 {costs} --csv {path}")
    assert found["lower_bound_s"] <= found["objective_s"] == found["makespan_s"]
    assert max(found["peak_activation_bytes"]) <= 3
    again = run_json(capsys, f"simulate --from-csv {path} {costs.rpartition(' --memory')[0]}")
    assert again["makespan_s"] == found["makespan_s"]


@pytest.mark.parametrize(
    "flags", ["--ranks 0", "--microbatches 0", "--placement v", "--memory-limit-bytes 0.5", "--ranks 99999999"]
)
def test_a_search_that_cannot_be_is_refused(capsys, flags: str) -> None:
    refused(capsys, f"search --ranks 3 --microbatches 6 {COSTS} --activation-bytes 1 {flags}")


def test_simulate_shows_the_columns_of_memory_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--schedule 1f1b --ranks 2 --microbatches 4 --forward-s 1 --backward-input-s 1 --backward-weight-s 1 "
    words += "--activation-bytes 100 --output-bytes 10 --parameter-bytes 7000"
    lines = run(capsys, f"simulate {words}")[1].splitlines()
    assert lines[-3].split() == ["rank", "activation", "parameter", "gradient", "total"]
    assert lines[-2].split() == ["0", "200", "7,000", "7,000", "14,200"]
    memory = run_json(capsys, "simulate", words + " --receive-window 2 --optimizer adamw")["memory"]
    assert memory["optimizer_bytes"] == [14000, 14000]
    assert memory["receive_buffer_bytes"] == [20, 20]
    assert memory["total_bytes"] == [28220, 28120]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--receive-window 0", "--receive-window must be a whole number of 1 or more, got 0"),
        ("--optimizer lion", "'lion'"),
    ],
)
def test_columns_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert message in refused(capsys, f"simulate --schedule 1f1b --ranks 2 --microbatches 4 {flags}")


def test_attribute_and_compare_read_saved_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one.trace", tmp_path / "other.trace"
    for path, latency in ((one, 0.25), (other, 0.5)):
        run_json(capsys, "simulate", AFAB, COSTS, f"--output-bytes 8 --latency-s {latency} --out {path}")
    found = run_json(capsys, f"attribute {one}")
    trace = Trace.load(one)
    assert found["bubble_s"] == trace.bubble_s.tolist()
    parts = ("warm_up", "drain", "imbalance", "messages", "streams", "collectives", "copies", "device", "straggler")
    for rank, bubble_s in enumerate(found["bubble_s"]):
        assert sum(found[f"{part}_s"][rank] for part in parts) == pytest.approx(bubble_s)
    compared = run_json(capsys, f"compare {one} {other}")
    assert compared["difference_s"] == pytest.approx(compared["parts_s"]["messages"]) == pytest.approx(1.0)
    code, out, err = run(capsys, f"attribute {one}")
    assert (code, err) == (0, "")
    assert "critical path: " in out
    code, out, err = run(capsys, f"compare {one} {other}")
    assert (code, err) == (0, "")
    assert "The second step takes 15.5 s, 1 s longer than the first 14.5 s" in out  # nobody measured either


def test_attribute_and_compare_refuse_what_they_cannot_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one.trace", tmp_path / "other.trace"
    run_json(capsys, "simulate", AFAB, COSTS, f"--out {one}")
    run_json(capsys, "simulate --schedule 1f1b --ranks 3 --microbatches 4", COSTS, f"--out {other}")
    assert "different programs" in refused(capsys, f"compare {one} {other}")
    table = tmp_path / "step.csv"
    table.write_text("rank,stage")
    assert "cannot be read back" in refused(capsys, f"attribute {table}")
    for missing in ("missing", "missing.json"):
        assert "cannot open" in refused(capsys, f"attribute {tmp_path}/{missing}")


def test_attribute_is_told_what_actions_should_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, costs = tmp_path / "one.trace", tmp_path / "costs.json"
    run_json(capsys, "simulate --schedule 1f1b --ranks 2 --microbatches 4", COSTS, f"--out {one}")
    half = LayerCost(name="half", forward_s=0.5, backward_input_s=0.5, backward_weight_s=0.5)
    save_costs([half] * 2, costs)
    trace = Trace.load(one)
    expected_s = 4 * 1.5
    found = run_json(capsys, f"attribute {one} --costs {costs}")
    assert found["stretched_s"] == pytest.approx((trace.compute_s - expected_s).tolist())
    assert run_json(capsys, f"attribute {one}")["stretched_s"] is None
    assert "--costs FILE" in refused(capsys, f"attribute {one} --partition even")


def test_simulate_adds_up_gradients_over_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{COSTS} --parameter-bytes 8 --replicas 4 --reduce-latency-s 0.5 --reduce-bytes-per-s 1"
    printed = run_json(capsys, "simulate", AFAB, flags)
    ends = np.array(printed["reduce_end_s"])
    assert (ends - printed["reduce_start_s"]).tolist() == [15.0] * 3  # 2 x 3 rounds of 2 s and 0.5 s latency
    assert printed["reduce_bytes"] == [8] * 3
    assert printed["step_s"] == ends.max() == printed["makespan_s"] + 15
    assert printed["conditions"] == {"reduction": {"replicas": 4, "latency_s": 0.5, "bytes_per_s": 1.0}}
    conditions = {field.name for field in fields(Conditions)}
    assert not conditions & {*printed, *printed["details"]}  # each is said once
    code, out, _ = run(capsys, "simulate", AFAB, flags)
    assert code == 0
    assert f"with reductions  {printed['step_s']:.6g} s" in out
    assert "step_s" not in run_json(capsys, "simulate", AFAB, COSTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reduce-latency-s 1", "--reduce-latency-s says what replicas cost: give --replicas too"),
        ("--replicas 0", "replicas must be a whole number of 1 or more, got 0"),
        ("--replicas 2 --reduce-bytes-per-s 0", "bytes_per_s must be > 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert message in refused(capsys, "simulate", AFAB, flags)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("ppsim.cli.main.search", ["search --ranks 2 --microbatches 4", COSTS]),
        ("ppsim.cli.simulate_command.simulate", ["simulate", AFAB, COSTS]),
        ("ppsim.cli.estimate_command.estimate_costs", ["estimate --layers 4 --device h100"]),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    work: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cause of a bug: `search` searched, for a minute where its kernels were not compiled yet, and then refused."""
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))
    assert "cannot write" in refused(capsys, *words, "--out", "no/such/directory/x.json")


def test_an_order_of_two_copies_comes_back_with_their_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both = f"schedule --schedule dualpipe --ranks 4 --microbatches 8 --csv {tmp_path}/both.csv"
    named = run_json(capsys, both)
    assert (named["copies"], named["stages"], named["placement"]) == (2, 8, [0, 1, 2, 3, 3, 2, 1, 0])
    again = run_json(capsys, f"schedule --from-csv {tmp_path}/both.csv --copies 2")
    assert {**again, "name": "dualpipe"} == named
    one, all_ = (
        run_json(capsys, f"simulate {flags}", COSTS)
        for flags in (f"--from-csv {tmp_path}/both.csv --copies 2", "--schedule dualpipe --ranks 4 --microbatches 8")
    )
    assert one["makespan_s"] == all_["makespan_s"]
    assert "stage 0, microbatch 4 has no F" in refused(capsys, f"schedule --from-csv {tmp_path}/both.csv")
    assert "8 stages are not 3 copies" in refused(capsys, f"schedule --from-csv {tmp_path}/both.csv --copies 3")
    assert "copies must be a whole number" in refused(capsys, f"schedule --from-csv {tmp_path}/both.csv --copies 0")
    said = refused(capsys, "schedule --schedule 1f1b --ranks 2 --microbatches 4 --copies 2")
    assert "--copies says what a file holds: give --from-csv too" in said


def test_replicas_of_one_add_up_the_copies(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "simulate --schedule dualpipe --ranks 2 --microbatches 4 --parameter-bytes 1000 --replicas 1"
    found = run_json(capsys, f"{flags} --reduce-bytes-per-s 1000", COSTS)
    assert found["step_s"] > found["makespan_s"]
