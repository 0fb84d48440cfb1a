"""Plans against exhaustive prediction: bounds never rule out a winner, and every loser has its reason."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppsim import Choices, Cluster, Plans, Schedule, Transformer, named_machine, plan, predict_steps, step_memory
from ppsim.costs.layout import Layout
from ppsim.planning.candidates import balanced_blocks, candidates
from ppsim.planning.step_memory import least_memory
from ppsim.planning.step_table import StepTable

GPT = Transformer.gpt(layers=24, hidden=2048, heads=16, vocabulary=51_200, positions=2048)
ALL = Choices(
    schedules=("1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v", "interleaved-zb", "v-half", "dualpipe-v", "afab"),
    stages_per_rank=(2, 3),
    micro_batch_sizes=(1, 2, 4),
)


def _cluster(devices: int = 16, name: str = "a100") -> Cluster:
    return Cluster(machine=named_machine(name), devices=devices)


@pytest.fixture(scope="module")
def plans() -> Plans:
    return plan(GPT, _cluster(), global_batch=64, seq=2048, choices=ALL, keep=5)


def test_bounds_are_never_above_the_prediction() -> None:
    """Of every schedule, on machines from quick to slow networks."""
    for devices, name in ((16, "a100"), (32, "h100")):
        cluster = _cluster(devices, name)
        steps = list(candidates(GPT, cluster, seq=2048, global_batch=64, choices=ALL))
        assert {step.schedule for step in steps} == set(ALL.schedules)
        table = StepTable(steps)
        bounds, exact = table.bounds_s(cluster.machine), table.seconds(cluster.machine).step
        assert (bounds <= exact * (1 + 1e-12)).all()
        assert (bounds > 0.5 * exact).mean() > 0.7  # and they say something


def test_least_memory_is_never_above_the_memory() -> None:
    for step in candidates(GPT, _cluster(), seq=2048, global_batch=64, choices=ALL):
        assert (least_memory(step).total <= step_memory(step).total * (1 + 1e-12)).all()


@pytest.mark.parametrize(("devices", "limit"), [(8, 80), (16, 80), (16, 14), (64, 30)])
def test_ruling_out_finds_the_best_that_all_predictions_find(devices: int, limit: int) -> None:
    few, all_of_them = (
        plan(
            GPT,
            _cluster(devices),
            global_batch=64,
            seq=2048,
            choices=ALL,
            memory_limit_bytes=limit * 10**9,
            keep=keep,
        )
        for keep in (3, 10**6)
    )
    assert [each.step_s for each in few[:3]] == [each.step_s for each in all_of_them[:3]]
    assert few.considered == all_of_them.considered
    assert len(few) <= len(all_of_them)
    assert not any(each.is_bound and each.fits is not False for each in all_of_them.losers)


def test_the_ranked_are_predicted_and_ascend(plans: Plans) -> None:
    seconds = [each.step_s for each in plans]
    assert seconds == sorted(seconds)
    assert seconds == pytest.approx(predict_steps([each.step for each in plans], named_machine("a100")).step)
    assert plans.best.step_s == seconds[0]
    for each in plans:
        assert each.fits
        assert each.total_bytes == pytest.approx(step_memory(each.step).total.max(), abs=len(each.memory_bytes))
        assert sum(each.parts_s.values()) == pytest.approx(each.step_s)
        assert min(each.parts_s.values()) >= -1e-9
        assert each.step.devices == 16
        assert each.step.global_batch == 64
        assert 0 < each.utilisation < 1


def test_every_loser_has_its_reason(plans: Plans) -> None:
    kinds = {"slower": 0, "bound": 0}
    for each in plans.losers:
        if not each.is_bound:
            kinds["slower"] += 1
            assert "% slower: " in each.reason
        else:
            kinds["bound"] += 1
            assert each.reason.startswith("at least ")
            assert each.step_s >= plans[4].step_s
    assert min(kinds.values()) > 0
    assert plans.considered == 1 + sum(kinds.values())


def test_what_does_not_fit_says_what_and_by_how_much() -> None:
    found = plan(GPT, _cluster(), global_batch=64, seq=2048, choices=ALL, memory_limit_bytes=14 * 10**9, keep=10**6)
    unfit = [each for each in found.losers if each.fits is False]
    assert unfit
    for each in unfit:
        assert each.total_bytes > 14 * 10**9
        assert "GB more than 14.0 GB; most of it " in each.reason
        assert f"{max(each.memory_bytes.values()) / 1e9:.1f} GB" in each.reason


def test_nothing_beats_the_edge_in_both(plans: Plans) -> None:
    edge = plans.pareto
    assert edge[0] is plans.best
    for each in plans:
        assert any(kept.step_s <= each.step_s and kept.total_bytes <= each.total_bytes for kept in edge)
    for kept in edge:
        assert not any(each.step_s < kept.step_s and each.total_bytes < kept.total_bytes for each in plans)


def test_the_winner_can_be_run() -> None:
    found = plan(GPT, _cluster(), global_batch=64, seq=2048, choices=Choices(tp=(2,), pp=(4,), recompute=("full",)))
    for each in found:
        step = each.step
        assert Schedule.from_csv(each.schedule.to_csv()).orders == each.schedule.orders
        sizes = Layout.parse(each.layout).sizes
        assert sizes == [n + (s == 0) + (s == len(sizes) - 1) for s, n in enumerate(step.stage_blocks)]
        assert f"--training.local_batch_size {64 // step.dp}" in (each.torchtitan_flags() or [])
        if each.megatron_flags is None:
            assert step.schedule.startswith("zb")
        else:
            assert f"--pipeline-model-parallel-layout '{each.layout}'" in each.megatron_flags
            assert "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1" in (
                each.megatron_flags
            )


@pytest.mark.parametrize(("layers", "stages", "first", "last"), [(10, 4, 0.1, 2.0), (9, 3, 0.0, 4.5), (7, 2, 1.5, 1.0)])
def test_balanced_blocks_are_the_best_of_all(layers: int, stages: int, first: float, last: float) -> None:
    def slowest(blocks: tuple[int, ...]) -> float:
        return max(n + first * (s == 0) + last * (s == stages - 1) for s, n in enumerate(blocks))

    every = [blocks for blocks in np.ndindex(*([layers + 1] * stages)) if sum(blocks) == layers]
    assert slowest(balanced_blocks(layers, stages, first, last)) == pytest.approx(min(map(slowest, every)))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no choice of tp, pp and micro batch divides 16 devices, 7 samples"):
        plan(GPT, _cluster(), global_batch=7, seq=2048, choices=Choices(pp=(1,), tp=(1,)))
    with pytest.raises(ValueError, match=r"none of \d+ plans fits 1.0 GB: the smallest \(tp .*needs at least .* GB on"):
        plan(GPT, _cluster(), global_batch=64, seq=2048, memory_limit_bytes=10**9)
    with pytest.raises(ValueError, match="global_batch must be a whole number of 1 or more"):
        plan(GPT, _cluster(), global_batch=0, seq=2048)
    with pytest.raises(ValueError, match="unknown schedule 'zb'"):
        plan(GPT, _cluster(), global_batch=64, seq=2048, choices=Choices(schedules=("zb",)))
    with pytest.raises(ValueError, match="devices must be"):
        _cluster(0)
    with pytest.raises(ValueError, match="recompute is empty"):
        Choices(recompute=())
    with pytest.raises(ValueError, match="seq 4096 exceeds the model's 2048 positions"):
        plan(GPT, _cluster(), global_batch=64, seq=4096)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tp", (0,), r"tp\[0\] must be a whole number of 1 or more, got 0"),
        ("pp", (2, 0), r"pp\[1\] must be"),
        ("micro_batch_sizes", (0,), r"micro_batch_sizes\[0\] must be"),
        ("stages_per_rank", (-1,), r"stages_per_rank\[0\] must be"),
        ("tp", (), "tp is empty"),
        ("stages_per_rank", (), "stages_per_rank is empty"),
        ("schedules", ("1f1b", "foo"), "unknown schedule 'foo'"),
    ],
)
def test_choices_that_cannot_be_are_refused(field: str, value: tuple[object, ...], message: str) -> None:
    """Causes of bugs: zeros divided, empty lists were defaults or dropped schedules, unknown names went unseen."""
    with pytest.raises(ValueError, match=message):
        Choices(**{field: value})  # type: ignore[arg-type]


def test_ten_billion_devices_are_looked_at_in_no_time() -> None:
    """Cause of a bug: all divisors of the devices were looked for, though a pipeline has no more ranks than blocks."""
    steps = list(candidates(GPT, _cluster(10**10), seq=2048, global_batch=10**10, choices=Choices(schedules=("1f1b",))))
    assert {step.devices for step in steps} == {10**10}
    assert {step.pp for step in steps} == {1, 2, 4, 5, 8, 10, 16, 20}


def test_the_table_has_all_plans(plans: Plans) -> None:
    frame = plans.to_frame()
    assert len(frame) == plans.considered
    assert frame.step_s.iloc[0] == plans.best.step_s
    assert not any(math.isnan(value) for value in frame.memory_bytes)
