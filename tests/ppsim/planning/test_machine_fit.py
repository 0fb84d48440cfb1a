"""Fits find constants that made the steps, and files of measured steps are read or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ppsim import (
    MeasuredStep,
    TrainingStep,
    Transformer,
    fit_machine,
    named_machine,
    predict_steps,
    read_measured_steps,
)
from ppsim.planning.machine_fit import error_summary, prediction_errors

HEADER = (
    "global batch,micro batch,hidden size,attention heads,# layers,sequence length,tensor parallelism,"
    "data parallelism,pipeline parallelism,iteration time (ms)"
)
START = named_machine("a100", fitted=False)


def _steps() -> list[TrainingStep]:
    return [
        TrainingStep(
            model=Transformer.gpt(layers=layers, hidden=hidden, heads=16, vocabulary=51_200, positions=1024),
            seq=1024,
            micro_batch_size=size,
            microbatches=4,
            tp=tp,
            pp=pp,
            dp=dp,
        )
        for layers in (8, 16)
        for hidden in (1024, 4096)
        for size in (1, 8)
        for tp, pp, dp in [(1, 1, 1), (1, 2, 4), (2, 1, 4), (4, 2, 1), (8, 1, 2)]
    ]


def test_constants_that_made_the_steps_are_found() -> None:
    """Steps of a machine with other constants, 1 % of noise, and two of forty far off."""
    true = replace(START, product_efficiency=0.6, launch_s=9e-5, node_latency_s=4e-4, network_bytes_per_s=4e10)
    steps = _steps()
    noise = np.random.default_rng(0).normal(0, 0.01, len(steps))
    noise[[3, 17]] = 0.5
    seconds = predict_steps(steps, true).step * np.exp(noise)
    measured = [MeasuredStep(step=s, seconds=float(t), place="") for s, t in zip(steps, seconds, strict=True)]
    fit = fit_machine(measured, START)
    assert fit.machine.launch_s == pytest.approx(true.launch_s, rel=0.05)
    assert fit.machine.product_efficiency == pytest.approx(true.product_efficiency, rel=0.1)
    good = np.delete(np.abs(fit.error), [3, 17])
    assert good.mean() < 0.02
    assert np.abs(predict_steps(steps, START).step / seconds - 1).mean() > 0.1
    assert 0 < fit.machine.spread["launch_s"] < 0.1


def test_what_steps_say_nothing_of_keeps_its_value_and_its_spread() -> None:
    steps = [step for step in _steps() if step.devices == 1]
    seconds = predict_steps(steps, START).step
    measured = [MeasuredStep(step=s, seconds=float(t), place="") for s, t in zip(steps, seconds, strict=True)]
    fit = fit_machine(measured, START)
    assert fit.machine.network_bytes_per_s == pytest.approx(START.network_bytes_per_s)
    assert fit.machine.spread["network_bytes_per_s"] == pytest.approx(0.4)
    assert np.abs(fit.error).max() < 1e-6


def test_what_layers_of_a_shape_have_in_common_is_found() -> None:
    """Layers take by chance more or less than constants say, by their shape; other steps of these shapes show it."""
    ways = [(1, 4, 1), (2, 4, 1), (2, 8, 2), (4, 8, 1)]
    shapes = [step for step in _steps() if step.devices == 1 or step.tp > 1]
    names = sorted({name for step in shapes for name in step.layer_shapes})
    chance = np.random.default_rng(0).normal(0, 0.1, len(names))
    true = replace(START, layer_factors=dict(zip(names, np.exp(chance).tolist(), strict=True)))
    steps = [replace(step, pp=pp, microbatches=m, dp=dp) for step in shapes for pp, m, dp in ways]
    measured = [
        MeasuredStep(step=step, seconds=float(seconds), place="")
        for step, seconds in zip(steps, predict_steps(steps, true).step, strict=True)
    ]
    others = [replace(step, pp=4, dp=2, microbatches=16) for step in shapes]
    asked = [
        MeasuredStep(step=step, seconds=float(seconds), place="")
        for step, seconds in zip(others, predict_steps(others, true).step, strict=True)
    ]
    found, without = (fit_machine(measured, START, by_shape=way).machine for way in (True, False))
    assert set(found.layer_factors) == set(names)
    assert without.layer_factors == {}
    assert np.abs(prediction_errors(asked, found)).mean() < 0.01
    assert np.abs(prediction_errors(asked, without)).mean() > 0.03


def test_shapes_of_few_steps_get_no_factor() -> None:
    """One run that was disturbed is no property of its shape."""
    steps = [replace(_steps()[0], pp=pp) for pp in (1, 2)]
    seconds = predict_steps(steps, START).step * 1.3
    measured = [MeasuredStep(step=s, seconds=float(t), place="") for s, t in zip(steps, seconds, strict=True)]
    assert fit_machine(measured, START).machine.layer_factors == {}


def test_shapes_are_named_by_all_that_their_time_depends_on() -> None:
    step = _steps()[0]
    deeper = replace(step, model=replace(step.model, layers=24), dp=4, microbatches=2)
    assert deeper.layer_shapes == step.layer_shapes
    others = (
        replace(step, micro_batch_size=2),
        replace(step, tp=2),
        replace(step, recompute="full"),
        replace(step, attention="unfused"),
        replace(step, model=replace(step.model, hidden=2048, head_dim=128)),
    )
    assert len({other.layer_shapes for other in (step, *others)}) == 1 + len(others)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="no measured steps"):
        fit_machine([], START)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), "a"])
def test_seconds_that_cannot_be_are_refused(seconds: object) -> None:
    """Cause of a bug: they were taken, and a fit to them ended in NaN."""
    with pytest.raises(ValueError, match=r"seconds must be"):
        MeasuredStep(step=_steps()[0], seconds=seconds, place="steps.csv, row 2")  # type: ignore[arg-type]


def test_errors_are_summed_up() -> None:
    errors = prediction_errors([MeasuredStep(step=_steps()[0], seconds=1.0, place="")], START)
    assert errors[0] == predict_steps(_steps()[:1], START).step[0] - 1
    assert error_summary(np.array([0.1, -0.3, 0.05])) == pytest.approx(
        {"steps": 3, "mean_error": 0.15, "mean_signed_error": -0.05, "median_error": 0.1, "worst_error": 0.3}
    )


def _written(tmp_path: Path, *lines: str, mark: str = "") -> Path:
    path = tmp_path / "steps.csv"
    path.write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_are_read_by_the_names_of_their_columns(tmp_path: Path) -> None:
    """vTrain's file for many nodes has a byte order mark and a column more than the one for one node."""
    path = _written(
        tmp_path, "Parameters (billion)," + HEADER, "3.6,512,8,3072,32,30,2048,2,32,1,3975.2", mark="\ufeff"
    )
    (found,) = read_measured_steps(path, memory_bytes=80 * 10**9, recompute="full")
    assert found.seconds == pytest.approx(3.9752)
    step = found.step
    assert (step.tp, step.dp, step.pp, step.micro_batch_size, step.microbatches) == (2, 32, 1, 8, 2)
    assert (step.model.hidden, step.model.heads, step.model.layers, step.seq) == (3072, 32, 30, 2048)
    assert (step.recompute, step.attention, step.global_batch) == ("full", "unfused", 512)


def test_recomputation_is_taken_where_rows_do_not_fit_without(tmp_path: Path) -> None:
    path = _written(tmp_path, HEADER, "512,1,3072,32,30,2048,8,64,1,1000", "512,8,3072,32,30,2048,1,64,1,3566.5")
    kept = read_measured_steps(path, memory_bytes=10**12)
    dropped = read_measured_steps(path, memory_bytes=80 * 10**9)
    assert [each.step.recompute for each in kept] == ["none", "none"]
    assert [each.step.recompute for each in dropped] == ["full", "full"]


ROW = "512,8,3072,32,30,2048,2,32,1,3975.2"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([HEADER], "has no rows"),
        ([HEADER.replace("hidden size", "width"), ROW], "has no column 'hidden'"),
        ([HEADER.replace("iteration time (ms)", "time"), ROW], "has no column of step times"),
        ([HEADER, "512,8"], "row 2 has 2 cells and the header 10"),
        ([HEADER, ROW.replace("3072", "wide")], "row 2: hidden size must be a whole number of 1 or more, got 'wide'"),
        ([HEADER, ROW.replace("3975.2", "nan")], r"iteration time \(ms\) must be a number above 0, got 'nan'"),
        ([HEADER, ROW.replace("512", "500")], "global_batch 500 is no multiple of micro_batch_size x dp = 256"),
        ([HEADER, ROW.replace("3072", "3073")], "row 2: heads 32 must divide hidden 3073"),
        # Causes of bugs: a traceback, and a message of thousands of digits.
        ([HEADER, ROW.replace("3975.2", "1" * 200_000)], "is not CSV: field larger than field limit"),
        (
            [HEADER, ROW.replace("3072", "9" * 5_000)],
            r"hidden size must be a whole number .*, got '9+\.\.\.$",
        ),
        ([HEADER, ROW.replace("3975.2", "1" * 5_000)], r"must be a number above 0, got '1+\.\.\.$"),
        ([f"{HEADER},recompute", f"{ROW},some"], "recompute must be one of none, selective, full, got 'some'"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        read_measured_steps(path, recompute="none")
    assert str(path) in str(error.value)
