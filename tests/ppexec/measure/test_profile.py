"""Profile: layer costs, measured on as many processes as will run; bytes are exact."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import pytest

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.measure.layer_samples import LayerSamples
from ppexec.measure.profile import summarise
from tests.support.remote import tiny


@pytest.mark.parametrize("schedule", ["afab", "zb-h1"])
@pytest.mark.parametrize("partition", ["2,2", "1,3"])
def test_every_layer_has_its_cost_whatever_rank_measured_it(pool: WorkerPool, schedule: str, partition: str) -> None:
    config = tiny(schedule=schedule, partition=partition, hidden=6, intermediate=10, seq=3, micro_batch_size=2)
    layers = ppexec.profile(config, pool=pool)
    assert [layer.name for layer in layers] == ["mlp 0", "mlp 1", "mlp 2", "mlp 3"]
    item = 4
    for layer in layers:
        assert layer.forward_s > 0
        assert layer.full_backward_s > 0
        assert layer.backward_input_s > 0
        assert layer.backward_weight_s > 0
        assert layer.output_bytes == 6 * 6 * item
        assert layer.activation_bytes == 6 * (2 * 6 + 2 * 10) * item
        assert layer.weight_activation_bytes == 6 * 2 * (6 + 10) * item
        assert layer.parameter_bytes == (2 * 6 * 10 + 10 + 6) * item


@pytest.mark.parametrize(("schedule", "ranks"), [("dualpipe-v", 1), ("dualpipe", 2)])
def test_a_stage_without_split_backwards_has_their_costs_too(pool: WorkerPool, schedule: str, ranks: int) -> None:
    """Cause of a bug: another stage of its rank had some, so I and W of this one's layers were not run, and cost 0."""
    config = tiny(schedule=schedule, ranks=ranks)
    kinds = {(stage, kind) for o in config.pipeline.orders for stage, kind in zip(o.stage, o.kind, strict=True)}
    assert any((stage, ppsim.Kind.I) not in kinds for stage in range(config.pipeline.stages))
    with Session(config, pool=pool) as session:
        profile = session.profile(1)
    for cost in (*profile.layers, *profile.stages):
        assert cost.backward_input_s > 0
        assert cost.backward_weight_s > 0
        assert cost.full_backward_s > 0


def test_costs_can_be_saved_partitioned_and_simulated(pool: WorkerPool, tmp_path: Path) -> None:
    layers = ppexec.profile(tiny(), pool=pool)
    path = tmp_path / "costs.json"
    ppsim.save_costs(layers, path)
    assert ppsim.load_costs(path) == layers
    stages = ppsim.partition(layers, stages=2, method="optimal")
    trace = ppsim.simulate(ppsim.build_schedule("afab", ranks=2, microbatches=4), stages)
    assert trace.makespan_s > max(stage.work_s for stage in stages) * 4


def test_an_evaluation_has_forward_costs_alone(pool: WorkerPool) -> None:
    for layer in ppexec.profile(tiny(forward_only=True), pool=pool):
        assert layer.forward_s > 0
        assert layer.full_backward_s == 0


def test_rounds_gathered_over_calls_are_one_profile(pool: WorkerPool) -> None:
    with Session(tiny(), pool=pool) as session:
        rounds = [
            first + second for first, second in zip(session.profile_rounds(1), session.profile_rounds(2), strict=True)
        ]
        profile = session.summarise(rounds)
    assert [len(of_rank) for of_rank in rounds] == [3, 3]
    assert profile.environment["processes"] == 2
    for layer, spread in zip(profile.layers, profile.spread, strict=True):
        for name, (lower, upper) in spread.items():
            assert lower <= asdict(layer)[name] <= upper


def samples(forward_s: list[float], backward_s: float = 0.0) -> LayerSamples:
    found = LayerSamples()
    for seconds in forward_s:
        found.seconds["forward_s"].setdefault(0, []).append(seconds)
    if backward_s:
        found.seconds["backward_s"].setdefault(0, []).append(backward_s)
    found.sizes = defaultdict(dict, {0: {"output_bytes": 8}})
    return found


def test_a_cost_is_the_median_over_rounds_of_the_mean_over_microbatches() -> None:
    """A step takes the sum of its microbatches; one disturbed round out of three does not count."""
    rounds = [samples([1.0, 3.0]), samples([100.0, 200.0]), samples([3.0, 5.0])]
    profile = summarise([rounds], ["only"], {"cores": 1}, [1])
    (layer,) = profile.layers
    assert layer.forward_s == 4.0
    assert layer.output_bytes == 8
    assert layer.name == "only"
    assert profile.spread[0]["forward_s"] == (3.0, 77.0)
    assert profile.environment == {"cores": 1}
