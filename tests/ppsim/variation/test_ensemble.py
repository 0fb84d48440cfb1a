"""Ensemble: what is read off many samples."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from ppsim import Ensemble, Jitter, Network, StageCost, build_schedule, monte_carlo, simulate
from ppsim.variation.jitter import PARTS

COST = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=0.5, output_bytes=8)
NETWORK = Network(latency_s=0.5, bytes_per_s=32)


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    schedule = build_schedule("1f1b", ranks=3, microbatches=4)
    return monte_carlo(
        schedule,
        [COST] * 3,
        network=NETWORK,
        jitter=Jitter(action=0.1, rank=0.1, message=0.2),
        samples=200,
        seed=4,
        slow_ranks={2: 1.5},
        scale=[[1.0], [0.5], [1.0]],
    )


def test_summaries_are_those_of_the_samples(ensemble: Ensemble) -> None:
    assert len(ensemble) == 200
    assert ensemble.makespan_s.shape == (200,)
    assert ensemble.rank_time_s.shape == ensemble.compute_s.shape == (200, 3)
    assert ensemble.mean_s == ensemble.makespan_s.mean()
    assert ensemble.std_s == pytest.approx(np.sqrt(((ensemble.makespan_s - ensemble.mean_s) ** 2).sum() / 199))
    assert ensemble.percentile(50) == np.median(ensemble.makespan_s)
    assert ensemble.percentile([0, 100]).tolist() == [ensemble.makespan_s.min(), ensemble.makespan_s.max()]
    assert list(ensemble.percentiles_s) == ["p5", "p50", "p95", "p99"]
    assert sorted(ensemble.percentiles_s.values()) == list(ensemble.percentiles_s.values())
    idle = 1 - ensemble.compute_s.sum(axis=1) / (3 * ensemble.makespan_s)
    assert ensemble.bubble_fraction == pytest.approx(idle)


def test_tables_have_a_row_for_each_sample_and_each_percentile(ensemble: Ensemble) -> None:
    frame = ensemble.to_frame()
    assert frame.index.name == "sample"
    assert frame["makespan_s"].tolist() == ensemble.makespan_s.tolist()
    assert frame["compute_s[2]"].tolist() == ensemble.compute_s[:, 2].tolist()
    table = ensemble.quantiles([50, 90])
    assert table.index.tolist() == [50, 90]
    assert table.loc[90, "rank_time_s[1]"] == np.percentile(ensemble.rank_time_s[:, 1], 90)


def test_the_summary_is_json(ensemble: Ensemble) -> None:
    found = json.loads(json.dumps(ensemble.to_dict(), allow_nan=False))
    assert (found["samples"], found["seed"], found["engine"]) == (200, 4, "compiled")
    assert found["step_time_percentiles_s"] == ensemble.percentiles_s
    assert found["jitter"] == {"action": 0.1, "rank": 0.1, "message": 0.2}
    assert found["conditions"]["slow_ranks"] == {"2": 1.5}
    assert found["conditions"]["scale"] == [[1.0], [0.5], [1.0]]


def test_a_trace_can_be_had_of_every_sample(ensemble: Ensemble) -> None:
    found = ensemble.trace(199)
    assert found.makespan_s == ensemble.makespan_s[199]
    assert (found.details["sample"], found.details["seed"], found.conditions) == (199, 4, ensemble.conditions)
    json.dumps(found.details, allow_nan=False)
    for sample in (-1, 200):
        with pytest.raises(ValueError, match="they are numbered 0 to 199"):
            ensemble.trace(sample)
    middle = ensemble.nearest(50)
    assert abs(ensemble.step_s - ensemble.percentile(50)).min() == abs(
        ensemble.step_s[middle] - ensemble.percentile(50)
    )


def test_quantiles_of_starts_are_those_of_the_traces(ensemble: Ensemble) -> None:
    traces = [ensemble.trace(sample) for sample in range(200)]
    starts_s = np.array([trace.start_s - trace.start_s.min() for trace in traces])
    assert ensemble.start_quantiles_s([5, 95]).tolist() == np.percentile(starts_s, [5, 95], axis=0).tolist()


def test_starts_that_do_not_fit_are_refused(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppsim.variation.ensemble._MOST_STARTS", 2400)
    with pytest.raises(ValueError, match="200 samples of 24 starts do not fit: take at most 100 samples"):
        ensemble.start_quantiles_s()


def test_sensitivity_is_what_is_lost_without_a_parts_jitter(ensemble: Ensemble) -> None:
    table = ensemble.sensitivity()
    links = ["link 0-1", "link 1-0", "link 1-2", "link 2-1"]
    assert table.index.tolist() == ["actions", "ranks", "messages", "rank 0", "rank 1", "rank 2", *links]
    options = {"network": NETWORK, "samples": 200, "seed": 4, "conditions": ensemble.conditions}
    schedule = ensemble.program.schedule

    def mean_s(jitter: Jitter) -> float:
        return monte_carlo(schedule, [COST] * 3, jitter=jitter, **options).makespan_s.mean()

    without = mean_s(Jitter(action=0.1, rank=0.1))
    assert table.loc["messages", "saved_s"] == pytest.approx(ensemble.makespan_s.mean() - without, abs=1e-9)
    alone = mean_s(Jitter(rank=0.1)) - mean_s(Jitter())
    assert table.loc["ranks", "alone_s"] == pytest.approx(alone, abs=1e-9)
    # The slow rank is never idle for others' sake: its own jitter is what moves the step.
    assert table.loc[["rank 0", "rank 1", "rank 2"], "saved_s"].abs().idxmax() == "rank 2"


VARIED = {
    "actions": [
        Jitter(action=0.2),
        Jitter(factors={"F": np.array([0.5, 1.5])}),
        Jitter(factors={"B": np.array([0, 2])}),
    ],
    "ranks": [Jitter(rank=0.2)],
    "step": [Jitter(step=0.2)],
    "messages": [Jitter(message=0.5), Jitter(factors={"message": np.array([0.0, 2.0])})],
    "hiccups": [Jitter(hiccup_probability=0.2, hiccup_s=2.0)],
    "dispatch": [Jitter(factors={"dispatch": np.array([0.0, 2.0])})],
    "late": [Jitter(late_s=[0.0, 1.0])],
}


@pytest.mark.parametrize(("part", "jitter"), [(part, each) for part, jitters in VARIED.items() for each in jitters])
def test_each_kind_of_jitter_has_its_row(part: str, jitter: Jitter) -> None:
    """Cause of a bug: measured dispatches and messages counted as actions', lateness nowhere, links had no rows."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=4)
    found = monte_carlo(schedule, [COST] * 2, network=NETWORK, jitter=jitter, samples=50, dispatch_s=0.25)
    table = found.sensitivity()
    calm_s = simulate(schedule, [COST] * 2, network=NETWORK, dispatch_s=0.25).makespan_s
    of_links = ["link 0-1", "link 1-0"] if part == "messages" else []
    of_ranks = [] if part in ("messages", "step") else ["rank 0", "rank 1"]
    assert table.index.tolist() == [part, *of_ranks, *of_links]
    assert table.loc[part].tolist() == pytest.approx([found.makespan_s.mean() - calm_s] * 2)
    assert (table.loc[[*of_ranks, *of_links]] != 0).any(axis=None) or part == "step"


def test_every_field_of_jitter_is_of_some_part() -> None:
    names = [name for fields_of_part, _ in PARTS.values() for name in fields_of_part]
    assert sorted([*names, "factors"]) == sorted(each.name for each in fields(Jitter))
    assert list(VARIED) == list(PARTS)


def test_parts_are_told_apart() -> None:
    """What is saved without a part is what samples without it say."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=4)
    drawn = {"F": np.array([0.5, 1.5]), "dispatch": np.array([0.0, 2.0]), "message": np.array([0.0, 2.0])}
    jitter = Jitter(factors=drawn, late_s=[0.0, 1.0])
    options = {"network": NETWORK, "samples": 50, "dispatch_s": 0.25}
    found = monte_carlo(schedule, [COST] * 2, jitter=jitter, **options)
    table = found.sensitivity()
    assert table.index.tolist()[:4] == ["actions", "messages", "dispatch", "late"]
    for part, kind in (("actions", "F"), ("messages", "message"), ("dispatch", "dispatch")):
        factors = {name: each for name, each in drawn.items() if name != kind}
        without = monte_carlo(schedule, [COST] * 2, jitter=Jitter(factors=factors, late_s=[0.0, 1.0]), **options)
        saved_s = found.makespan_s.mean() - without.makespan_s.mean()
        assert table.loc[part, "saved_s"] == pytest.approx(saved_s, abs=1e-12)


def test_one_sample_has_no_spread() -> None:
    found = monte_carlo(build_schedule("afab", ranks=1, microbatches=1), [COST], jitter=Jitter(action=0.1), samples=1)
    assert found.std_s == 0
    nothing = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    empty = monte_carlo(build_schedule("afab", ranks=1, microbatches=1), [nothing], jitter=Jitter(action=0.1))
    assert empty.bubble_fraction.tolist() == [0.0] * 1000
