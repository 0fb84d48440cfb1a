"""Primus's files: a real run reads as it ran, written steps come back, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsim import InputError, Network, StageCost, attribute, build_schedule, critical_path, read_run, simulate
from tests.support.commandline import refused, run, run_json
from tests.support.primus import PUBLISHED, apart, write_primus

COST = StageCost(forward_s=1.0, backward_input_s=1.25, backward_weight_s=0.75, activation_bytes=2**30, output_bytes=8)


def test_the_published_run_is_1f1b_as_one_reads_it_off_the_files() -> None:
    found = read_run(PUBLISHED)
    assert (found.schedule.name, found.ranks, found.schedule.microbatches) == ("1f1b", 8, 16)
    assert list(found.steps) == list(range(1, 21))
    assert found.environment["world_size"] == 8
    written = [json.loads((PUBLISHED / f"pp_rank_{rank}.json").read_text())["10"] for rank in range(8)]
    trace = found.traces[9]
    # The first rank starts and ends a 1F1B step, so that its clock alone gives the step.
    assert trace.makespan_s == pytest.approx((written[0]["bwd_end"][-1] - written[0]["fwd_start"][0]) / 1e3, rel=1e-9)
    for rank, log in enumerate(written):
        busy_ms = sum(np.sum(log[f"{name}_end"]) - np.sum(log[f"{name}_start"]) for name in ("fwd", "bwd"))
        assert trace.compute_s[rank] == pytest.approx(busy_ms / 1e3, rel=1e-9)
        assert trace.total_peak_bytes[rank] == round(log["memory"] * 2**30)
    assert trace.memory.to_dict() == {"total_bytes": trace.total_peak_bytes.tolist()}
    # 20 ms of the last backward are no other backward's.
    rows = [str(trace.program.action_of(row)) for row in trace.program.rows_of(0)]
    lengths_s = dict(zip(rows, (trace.end_s - trace.start_s)[:32].tolist(), strict=True))
    assert lengths_s["0B15"] == pytest.approx(0.0880, abs=1e-4)
    assert lengths_s["0B14"] == pytest.approx(0.0699, abs=1e-4)


def test_nothing_of_the_published_run_starts_before_its_input() -> None:
    for trace in read_run(PUBLISHED).traces:
        messages = trace.program.messages
        assert (trace.start_s[messages.consumer] >= trace.end_s[messages.producer]).all()


def test_the_published_step_is_explained() -> None:
    trace = read_run(PUBLISHED).traces[9]
    found = attribute(trace)
    assert sum(found.fractions.values()) == pytest.approx(trace.bubble_fraction)
    # m + p - 1 forwards and as many backwards in a row, as in every 1F1B step with nearly equal stages.
    assert len(critical_path(trace).rows) == 2 * (16 + 8 - 1)
    assert critical_path(trace).by_what_s["compute"] > 0.98 * trace.makespan_s


SCHEDULES = [
    ("1f1b", None),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 3),
    ("zb-h1", None),
    ("zb-v", 2),
    ("afab", None),
]


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
@settings(max_examples=10, deadline=None)
@given(latency_s=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_written_steps_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, chunks: int | None, latency_s: float, seed: int
) -> None:
    """On ranks whose clocks are seconds apart: with messages as fast both ways the clocks are found again."""
    path = tmp_path_factory.mktemp("run")
    schedule = build_schedule(name, ranks=4, microbatches=8, stages_per_rank=chunks)
    step = simulate(schedule, [COST] * schedule.stages, network=Network(latency_s=latency_s))
    write_primus([step, step], path, behind_s=apart(4, seed))
    found = read_run(path, "primus")
    assert found.schedule.orders == schedule.orders
    assert found.schedule.placement == schedule.placement
    assert found.schedule.name == name
    assert found.traces[1].makespan_s == pytest.approx(step.makespan_s, abs=1e-9 * step.makespan_s)
    begun = found.traces[0].start_s - found.traces[0].start_s[0]
    assert begun == pytest.approx(step.start_s - step.start_s[0], abs=1e-6)


@pytest.mark.parametrize("chunks", [2, 3])
def test_older_files_have_no_chunks_and_megatrons_order(tmp_path: Path, chunks: int) -> None:
    schedule = build_schedule("interleaved-1f1b", ranks=4, microbatches=8, stages_per_rank=chunks)
    step = simulate(schedule, [COST] * schedule.stages)
    write_primus([step], tmp_path, behind_s=[0.0] * 4, numbered=False)
    found = read_run(tmp_path)
    assert found.schedule.orders == schedule.orders
    assert found.traces[0].makespan_s == pytest.approx(step.makespan_s)
    assert found.traces[0].total_peak_bytes.tolist() == step.memory.total_bytes.tolist()


def test_pairs_that_ran_as_one_are_pairs(tmp_path: Path) -> None:
    schedule = build_schedule("dualpipe-v", ranks=2, microbatches=6)
    step = simulate(schedule, [COST] * schedule.stages, overlap=0.75)
    write_primus([step], tmp_path, behind_s=[0.0, 1.0])
    found = read_run(tmp_path)
    assert found.schedule.orders == schedule.orders
    assert found.traces[0].makespan_s == pytest.approx(step.makespan_s)
    assert found.traces[0].compute_s == pytest.approx(step.compute_s)


def _broken(tmp_path: Path, rank: int, change) -> Path:
    step = simulate(build_schedule("1f1b", ranks=3, microbatches=4), [COST] * 3)
    write_primus([step, step], tmp_path, behind_s=[0.0] * 3, numbered=False)
    path = tmp_path / f"pp_rank_{rank}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda log: log.pop("2"), "rank 1 has no iteration 2"),
        (lambda log: log["2"].pop("bwd_end"), r"iteration 2: bwd_end must be a list"),
        (lambda log: log["1"]["fwd_start"].pop(), r"fwd_start has 3 times for 4 microbatches .* rank 1: 4 are needed"),
        (lambda log: log["1"]["fwd_start"].__setitem__(2, None), "fwd_start must be a list of milliseconds"),
        (lambda log: log["1"]["fwd_end"].__setitem__(2, 0.0), r"rank 1: 1F2 runs from"),
        (lambda log: log["1"]["fwd_end"].__setitem__(0, 2400.0), r"rank 1: 1F1 starts .* before 1F0 ends"),
        (lambda log: log.clear(), "a key for each iteration"),
        (lambda log: log.__setitem__("1", 3), "iteration 1: must be an object"),
        (lambda log: log["1"].__setitem__("bwd_chunk", [0, 1, 0, 0]), "numbers from 0 to 0"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path: Path, change, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_run(_broken(tmp_path, 1, change))


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    path = _broken(tmp_path, 0, lambda log: None)
    (path / "pp_rank_1.json").unlink()
    with pytest.raises(InputError, match=r"rank 1 of 3 is missing: add pp_rank_1\.json"):
        read_run(path)
    (path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_run(path)


def test_actions_that_are_no_schedule_are_refused(tmp_path: Path) -> None:
    """A backward before its forward: somebody mixed up two files."""

    def swap(log: dict) -> None:
        step = log["1"]
        for edge in ("start", "end"):
            step[f"fwd_{edge}"], step[f"bwd_{edge}"] = step[f"bwd_{edge}"], step[f"fwd_{edge}"]

    with pytest.raises(InputError, match="iteration 1: the actions in the order of their times are no schedule"):
        read_run(_broken(tmp_path, 1, swap))


def test_imported_steps_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "imported"
    document = run_json(capsys, "import", str(PUBLISHED), "--out", str(out))
    again = read_run(out)
    first = read_run(PUBLISHED)
    assert [each["makespan_s"] for each in document["steps"]] == [trace.makespan_s for trace in again.traces]
    assert list(again.steps) == list(first.steps)
    assert again.environment["format"] == "primus"
    assert (out / "schedule.csv").read_text() == build_schedule("1f1b", ranks=8, microbatches=16).to_csv()
    code, text, _ = run(capsys, "attribute", str(out / "step_10.trace"))
    assert code == 0
    assert "messages were not recorded" in text
    assert "not known  activation bytes" in run(capsys, "import", str(out))[1]
    single = read_run(out / "step_10.trace")
    assert single.traces[0].makespan_s == first.traces[9].makespan_s


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run that can be read" in refused(capsys, "import", str(tmp_path))
    assert "unknown format" in refused(capsys, "import", str(tmp_path), "--format", "nsys")
    assert "cannot open" in refused(capsys, "import", str(tmp_path / "nothing"))


def test_steps_of_a_run_can_be_chosen() -> None:
    found = read_run(PUBLISHED)
    assert list(found.only([3, 5]).steps) == [3, 5]
    with pytest.raises(InputError, match="no step 21"):
        found.only([21])
