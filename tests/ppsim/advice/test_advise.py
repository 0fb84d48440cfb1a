"""Advice: what it predicts is what the simulator gives for the true costs, its limits hold, its file loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ppsim import InputError, Run, Schedule, StageCost, Trace, advise, build_schedule, read_run, simulate
from tests.support.commandline import refused, run, run_json
from tests.support.primus import PUBLISHED

GIB = 2**30
COSTS = [
    StageCost(
        forward_s=1.0 + 0.25 * (stage == 3),
        backward_input_s=1.0,
        backward_weight_s=1.0,
        activation_bytes=2 * GIB,
        weight_activation_bytes=2 * GIB,
    )
    for stage in range(4)
]
SCHEDULE = build_schedule("1f1b", ranks=4, microbatches=8)
STEP = simulate(SCHEDULE, COSTS)


def _run(**columns: object) -> Run:
    bare = Trace(program=STEP.program, clock="measured", start_s=STEP.start_s, end_s=STEP.end_s, **columns)
    return Run(traces=[bare], steps=[0])


PEAKS = {"total_peak_bytes": STEP.peak_activation_bytes + 10 * GIB}


def test_named_schedules_are_predicted_as_they_are_simulated() -> None:
    found = advise(_run(**PEAKS), with_search=False)
    by_name = {each.name: each for each in found.candidates}
    assert found.current.step_s == pytest.approx(STEP.makespan_s)
    for name in ("afab", "zb-h1", "zb-h2"):
        true = simulate(build_schedule(name, ranks=4, microbatches=8), COSTS)
        assert by_name[name].step_s == pytest.approx(true.makespan_s)
        assert by_name[name].memory_bytes.tolist() == (true.peak_activation_bytes + 10 * GIB).tolist()
    assert by_name["zb-h1"].range_s[0] <= by_name["zb-h1"].step_s <= by_name["zb-h1"].range_s[1]
    assert "never splits a backward" in by_name["zb-h1"].uncertain[0]
    assert by_name["afab"].uncertain == ()
    assert found.best is found.candidates[0]
    assert "1f1b" not in by_name


def test_a_limit_is_kept_and_search_uses_it() -> None:
    limit = 10 * GIB + 4 * 2 * GIB  # what 1F1B holds at most
    found = advise(_run(**PEAKS), memory_limit_bytes=limit)
    by_name = {each.name: each for each in found.candidates}
    for each in found.candidates:
        assert each.fits == (each.memory_bytes.max() <= limit)
    assert not by_name["afab"].fits
    assert found.best is not None
    assert found.best.fits
    assert by_name["searched, 1 stage per rank"].step_s <= by_name["zb-h1"].step_s
    # Those that do not fit stand last.
    fits = [each.fits for each in found.candidates]
    assert fits == sorted(fits, reverse=True)


def test_a_tighter_limit_leaves_little() -> None:
    found = advise(_run(**PEAKS), memory_limit_bytes=10.5 * GIB)
    assert found.best is None
    assert "No schedule that fits" in str(found)
    assert "searched, 1 stage per rank" in found.left_out


def test_a_limit_needs_memory() -> None:
    with pytest.raises(InputError, match="does not tell what a microbatch holds"):
        advise(_run(), memory_limit_bytes=1e9)
    found = advise(_run(), with_search=False)
    assert all(each.memory_bytes is None for each in found.candidates)
    assert "not known" in str(found)


def test_text_says_what_is_lost() -> None:
    text = str(advise(_run(**PEAKS), with_search=False))
    assert f"The step takes {STEP.makespan_s:.4g} s" in text
    assert f"{STEP.bubble_fraction:.1%} is bubble" in text
    assert "Rank 3 computes longest" in text


def test_a_step_that_is_measured_with_split_backwards_is_less_uncertain() -> None:
    step = simulate(build_schedule("zb-h1", ranks=4, microbatches=8), COSTS)
    found = advise(Run(traces=[replace(step, clock="measured")], steps=[0]), with_search=False)
    assert all("never splits" not in note for each in found.candidates for note in each.uncertain)


def test_the_published_run_is_advised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, out = tmp_path / "best.csv", tmp_path / "out"
    limit = 120 * GIB
    words = ["advise", str(PUBLISHED), "--memory-limit-bytes", str(limit)]
    document = run_json(capsys, *words, "--csv", str(path), "--out", str(out))
    best = next(each for each in document["candidates"] if each["name"] == document["best"])
    assert best["step_s"] < 0.9 * document["current"]["step_s"]
    assert max(best["memory_bytes"]) <= limit
    assert document["current"]["step_s"] == pytest.approx(document["measured_s"], rel=0.01)
    schedule = Schedule.from_csv(path.read_text())
    schedule.check()
    assert (schedule.ranks, schedule.microbatches) == (8, 16)
    assert (out / "schedule.csv").read_text() == path.read_text() == document["csv"]
    assert "warm-up" in (out / "advice.html").read_text()
    code, text, _ = run(capsys, *words, "--no-search", "--choose", "zb-h1", "--csv", str(path))
    assert code == 0
    assert "pipeline_parallel_schedule_csv" in text
    assert Schedule.from_csv(path.read_text()).orders == build_schedule("zb-h1", ranks=8, microbatches=16).orders
    assert "the table has" in refused(capsys, *words, "--no-search", "--choose", "zb-h9")


def test_advice_is_a_table_and_json() -> None:
    found = advise(read_run(PUBLISHED).only([5, 6, 7]), with_search=False)
    frame = found.to_frame()
    assert frame["name"][0] == "1f1b"
    assert (frame["least_s"] <= frame["step_s"]).all()
    assert np.isfinite(frame["memory_bytes"]).all()
    json.dumps(found.to_dict())
