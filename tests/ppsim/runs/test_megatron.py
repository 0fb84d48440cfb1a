"""Megatron's timers: costs of stages come back from a log as Megatron-LM prints it, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppsim import InputError, StageCost, advise, build_schedule, costs_of, read_run, simulate
from tests.support.commandline import refused, run

TP, DP, PP, MICROBATCHES = 2, 2, 4, 8
STAGES = [
    StageCost(forward_s=f, backward_input_s=0, backward_weight_s=0, backward_s=2 * f) for f in (0.03, 0.02, 0.02, 0.04)
]
ARGUMENTS = {
    "data_parallel_size": DP,
    "global_batch_size": 4 * DP * MICROBATCHES,
    "micro_batch_size": 4,
    "pipeline_model_parallel_size": PP,
    "tensor_model_parallel_size": TP,
    "virtual_pipeline_model_parallel_size": None,
    "world_size": TP * DP * PP,
}


def _arguments(**changes: object) -> str:
    """As `_print_args` of Megatron-LM prints them."""
    rows = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in {**ARGUMENTS, **changes}.items()]
    return "\n".join(["------------------------ arguments ------------------------", *rows])


def _iteration(number: int, batch: int = ARGUMENTS["global_batch_size"]) -> str:  # type: ignore[assignment]
    return (
        f" [2025-11-13 16:26:1{number % 10}] iteration{number:>9}/{100:>8} | consumed samples: {number * batch:>12} | "
        f"elapsed time per iteration (ms): 1530.5 | learning rate: 1.000000E-05 | global batch size: {batch:>5} | "
        "lm loss: 1.090000E+01 | loss scale: 1.0 | grad norm: 1.000 |"
    )


def _timers(stages: list[StageCost], factor: float = 1.0, *, whole_s: float | None = None, shift: str = "") -> str:
    """As `Timers.log` prints them with the option "all": milliseconds of a step on each of the world's ranks."""
    lines = ["times across ranks (ms):"]
    share = TP * DP
    rows = {
        "forward-backward": [whole_s or 0.0] * len(stages),
        "forward-compute": [MICROBATCHES * each.forward_s * factor for each in stages],
        "backward-compute": [MICROBATCHES * each.full_backward_s * factor for each in stages],
        "forward-recv": [0.0, 0.1, 0.1, 0.1],
    }
    for name, seconds in rows.items():
        if any(seconds):
            lines.append(f"  {name}:")
        for rank, each in enumerate(np.repeat(seconds, share)):
            if each > 0:
                lines.append(f"     rank {rank:2d}: {each * 1e3:.2f}")
    return "\n".join(shift + line for line in lines)


def _log(path: Path, *parts: str) -> Path:
    path.write_text("\n".join(["using world size: 16, data-parallel size: 2", *parts, ""]))
    return path


def test_costs_of_stages_come_back(tmp_path: Path) -> None:
    factors = (1.3, 1.0, 0.99, 1.01)
    parts = [part for step, factor in enumerate(factors, 1) for part in (_iteration(step), _timers(STAGES, factor))]
    found = read_run(_log(tmp_path / "train.log", _arguments(), *parts))
    assert (found.schedule.name, found.ranks, found.schedule.microbatches) == ("1f1b", PP, MICROBATCHES)
    assert list(found.steps) == [1, 2, 3, 4]
    costs = costs_of(found)
    for cost, stage in zip(costs, STAGES, strict=True):
        assert cost.forward_s == pytest.approx(1.005 * stage.forward_s, rel=1e-4)
        assert cost.full_backward_s == pytest.approx(1.005 * stage.full_backward_s, rel=1e-4)
    # Computations of one step, laid out by the schedule, take what the simulation says they do.
    laid_out = simulate(build_schedule("1f1b", ranks=PP, microbatches=MICROBATCHES), STAGES)
    assert found.traces[1].makespan_s == pytest.approx(laid_out.makespan_s, rel=1e-4)
    assert found.traces[1].compute_s == pytest.approx(laid_out.compute_s, rel=1e-4)


def test_what_sums_cannot_tell_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laid_out_s = simulate(build_schedule("1f1b", ranks=PP, microbatches=MICROBATCHES), STAGES).makespan_s
    timers = _timers(STAGES, whole_s=laid_out_s + 0.125)
    path = _log(tmp_path / "train.log", _arguments(), _iteration(5), timers)
    found = read_run(path)
    assert found.unknown[:3] == ("activation bytes", "message times", "message bytes")
    assert "when each action ran" in found.unknown[3]
    assert "forward-backward takes 0.125 s more" in found.unknown[-1]
    text = run(capsys, "import", str(path))[1]
    assert "(megatron)" in text
    assert "when each action ran" in text
    advice = advise(found)
    assert "when each action ran" in advice.explain()
    assert advice.current.step_s == pytest.approx(laid_out_s, rel=1e-4)


def test_logs_of_several_nodes_are_one_job(tmp_path: Path) -> None:
    """Rank 0 prints arguments, the last rank timers, each rank its memory once; launchers number processes' lines."""
    peaks = [60, 50, 40, 70]
    memory = [
        f"[default{rank % 8}]:[Rank {rank}] (after 1 iterations) memory (MB) | allocated: 10.5 | max allocated: "
        f"{peaks[rank // 4]}.5 | reserved: 90.0 | max reserved: 90.0"
        for rank in (0, 4, 8, 12)
    ]
    _log(tmp_path / "node_0.out", _arguments(), *memory[:2])
    shifted = [f"[default7]:{_iteration(1)}", *memory[2:], _timers(STAGES, shift="[default7]:")]
    _log(tmp_path / "node_1.out", *shifted)
    found = read_run(tmp_path)
    assert costs_of(found)[3].forward_s == pytest.approx(0.04, rel=1e-4)
    assert found.traces[0].total_peak_bytes.tolist() == [int((each + 0.5) * 2**20) for each in peaks]


def test_chunks_share_what_their_rank_takes(tmp_path: Path) -> None:
    arguments = _arguments(virtual_pipeline_model_parallel_size=2)
    found = read_run(_log(tmp_path / "train.log", arguments, _iteration(1), _timers(STAGES)))
    assert (found.schedule.name, found.schedule.stages) == ("interleaved-1f1b", 8)
    assert [cost.forward_s for cost in costs_of(found)] == pytest.approx([0.015, 0.01, 0.01, 0.02] * 2, rel=1e-4)


def test_extremes_are_enough_for_equal_ranks(tmp_path: Path) -> None:
    text = (
        "(min, max) time across ranks (ms):\n"
        "    forward-compute ................................: (159.20, 160.80)\n"
        "    backward-compute ...............................: (318.40, 321.60)"
    )
    found = read_run(_log(tmp_path / "train.log", _arguments(), _iteration(1), text))
    assert [cost.forward_s for cost in costs_of(found)] == pytest.approx([0.02] * 4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((_iteration(1), _timers(STAGES)), "the argument pipeline_model_parallel_size is missing, which rank 0 prints"),
        ((_arguments(), _iteration(7), "times across ranks (ms):"), "has no forward-compute of any iteration"),
        (
            (_arguments(pipeline_model_parallel_size=5), _iteration(7), _timers(STAGES)),
            "forward-compute has rank 15, and the arguments say 16 ranks in 5 pipeline stages",
        ),
        (
            (_arguments(), _iteration(7), _timers(STAGES[:3])),
            "iteration 7: forward-compute has no rank of pipeline rank 3",
        ),
        ((_arguments(), _iteration(7, 33), _timers(STAGES)), "iteration 7: global batch 33 is no multiple of"),
        ((_arguments(world_size="many"), _iteration(7), _timers(STAGES)), "world_size must be a whole number"),
        (
            (_arguments(), _iteration(7), "max time across ranks (ms):\n    forward-compute ....: 160.00"),
            "which rank took what is not: log with --timing-log-level 2 --timing-log-option all",
        ),
        (
            (_arguments(), _iteration(7), _timers(STAGES).split("  backward-compute")[0]),
            "iteration 7: backward-compute is missing",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, parts: tuple[str, ...], said: str) -> None:
    path = _log(tmp_path / "train.log", *parts)
    with pytest.raises(ValueError, match="train") as caught:
        read_run(path, format="megatron")
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((_arguments(), _iteration(7), _timers(STAGES).replace("240.00", "2.4.0", 1)), "'2.4.0' is no number of"),
        ((_arguments(), _iteration(7), _timers(STAGES).replace("240.00", "9" * 400, 1)), "9... is no number of"),
        ((_arguments(), _iteration(7).replace("1530.5", "1.5.3"), _timers(STAGES)), "'1.5.3' is no number of"),
        ((_arguments(), f"[Rank 0] (after 1 iterations) memory (MB) | max allocated: {'9' * 400}"), "is no number of"),
        ((_arguments(world_size="9" * 5000), _iteration(7), _timers(STAGES)), "world_size must be a whole number"),
    ],
)
def test_digits_that_are_no_number_are_named(tmp_path: Path, parts: tuple[str, ...], said: str) -> None:
    """Cause of a bug: Python's own ValueError or OverflowError, a traceback on the command line."""
    path = _log(tmp_path / "train.log", *parts)
    with pytest.raises(InputError, match="train") as caught:
        read_run(path, format="megatron")
    assert said in str(caught.value)


def test_another_text_is_no_such_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("rank  0: 12.00\n")
    said = refused(capsys, "import", str(path))
    assert "megatron: a log" in said
