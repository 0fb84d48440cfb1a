"""Monte Carlo: against SimPy on the same draws, against closed forms, and against itself in other blocks and threads.

Seeds are fixed, and statistical bounds are five standard errors, so nothing here fails by chance.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Ensemble,
    Jitter,
    Link,
    Network,
    Reduction,
    Schedule,
    ScheduleError,
    StageCost,
    build_schedule,
    monte_carlo,
    simulate,
)
from tests.support.strategies import conditions, networks, offloads, schedules, stage_costs

COST = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=0.5, output_bytes=8, parameter_bytes=64)
NETWORK = Network(latency_s=0.25, bytes_per_s=64)
ALL = Jitter(action=0.1, rank=0.05, step=0.02, message=0.3, hiccup_probability=0.05, hiccup_s=2.0)
MEASURED = Jitter(
    factors={"F": np.array([0.5, 1.5]), "dispatch": np.array([0.0, 2.0]), "message": np.array([0.5, 1.5])},
    late_s=[0.0, 0.5],
)
ONE_F_ONE_B = build_schedule("1f1b", ranks=3, microbatches=5)


def of(jitter: Jitter, schedule: Schedule = ONE_F_ONE_B, samples: int = 50, **options) -> Ensemble:
    return monte_carlo(schedule, [COST] * schedule.stages, network=NETWORK, jitter=jitter, samples=samples, **options)


@given(data=st.data())
def test_both_engines_give_every_sample_the_same_bits_and_the_trace_has_them(data: st.DataObject) -> None:
    schedule = data.draw(schedules() | schedules().flatmap(offloads))
    costs = data.draw(stage_costs(schedule.stages))
    jitter = data.draw(st.sampled_from([ALL, Jitter(action=0.5), Jitter(message=1.0), Jitter()]))
    options = {
        "network": data.draw(networks(schedule.ranks)),
        "jitter": jitter,
        "samples": 3,
        "seed": data.draw(st.integers(0, 2**64)),
        "conditions": data.draw(conditions(schedule, sharing=(None,))),
    }
    compiled, simpy = (monte_carlo(schedule, costs, engine=engine, **options) for engine in ("compiled", "simpy"))
    for name in ("makespan_s", "step_s", "rank_time_s", "compute_s", "bubble_fraction"):
        assert getattr(compiled, name).tolist() == getattr(simpy, name).tolist()
    for ensemble in (compiled, simpy):
        check_samples(ensemble)


def check_samples(ensemble: Ensemble) -> None:
    """Every sample is what its own trace says, to the last bit."""
    for sample in range(len(ensemble)):
        trace = ensemble.trace(sample)
        assert (trace.makespan_s, trace.step_s) == (ensemble.makespan_s[sample], ensemble.step_s[sample])
        assert trace.rank_time_s.tolist() == ensemble.rank_time_s[sample].tolist()
        assert trace.compute_s.tolist() == ensemble.compute_s[sample].tolist()
        assert trace.bubble_fraction == ensemble.bubble_fraction[sample]
        assert trace.conditions == ensemble.conditions


@given(data=st.data())
def test_every_sample_is_its_trace_under_any_conditions(data: st.DataObject) -> None:
    """Cause of a bug: samples added up the gradients of all weights, traces those of the trained ones."""
    schedule = data.draw(schedules() | schedules().flatmap(offloads))
    costs = [
        replace(cost, parameter_bytes=64, gradient_bytes=data.draw(st.sampled_from([None, 0, 16])))
        for cost in data.draw(stage_costs(schedule.stages))
    ]
    ensemble = monte_carlo(
        schedule,
        costs,
        network=data.draw(networks(schedule.ranks)),
        jitter=data.draw(st.sampled_from([MEASURED, ALL, Jitter()])),
        samples=3,
        conditions=data.draw(conditions(schedule)),
    )
    check_samples(ensemble)


def test_gradients_of_frozen_weights_are_not_added_up_in_samples_either() -> None:
    frozen = replace(COST, parameter_bytes=1000, gradient_bytes=10)
    options = {"reduction": Reduction(replicas=2, bytes_per_s=100.0)}
    found = monte_carlo(ONE_F_ONE_B, [frozen] * 3, jitter=Jitter(), samples=1, **options)
    assert found.step_s[0] == found.trace(0).step_s == simulate(ONE_F_ONE_B, [frozen] * 3, **options).step_s


@given(data=st.data())
def test_without_jitter_every_sample_is_what_simulate_says(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    costs = data.draw(stage_costs(schedule.stages))
    network = data.draw(networks(schedule.ranks)).slowed({(0, 1): 3.0})
    options = {"slow_ranks": {0: 1.5}, "dispatch_s": 0.1, "overlap": 0.7}
    trace = simulate(schedule, costs, network=network, **options)
    found = monte_carlo(schedule, costs, network=network, jitter=Jitter(), samples=2, **options)
    assert found.makespan_s.tolist() == [trace.makespan_s] * 2
    assert found.rank_time_s.tolist() == [trace.rank_time_s.tolist()] * 2
    assert found.std_s == 0


def test_samples_do_not_depend_on_their_number_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppsim.variation.sample_times._BLOCK_ROWS", 4 * len(ONE_F_ONE_B.program.stage))  # 13 blocks
    whole = of(ALL, threads=1)
    assert len(np.unique(whole.makespan_s)) == 50
    for samples in (1, 4, 5, 49):
        assert of(ALL, samples=samples).makespan_s.tolist() == whole.makespan_s[:samples].tolist()
    for options in ({"threads": 2}, {"threads": 5}, {"engine": "simpy"}):
        assert of(ALL, **options).makespan_s.tolist() == whole.makespan_s.tolist()
    assert whole.trace(49).makespan_s == whole.makespan_s[49]
    assert not np.isin(of(ALL, seed=1).makespan_s, whole.makespan_s).any()
    assert of(ALL, seed=1).makespan_s.tolist() == of(ALL, seed=1).makespan_s.tolist()


@pytest.mark.parametrize("jitter", [Jitter(action=0.2), Jitter(action=0.2, rank=0.1, step=0.05)])
def test_one_rank_adds_its_actions_up(jitter: Jitter) -> None:
    """The mean is m (F + B). With factors R and S common to a step, the sum X of its actions has E[(RSX)^2] =
    (1 + r^2) (1 + s^2) E[X^2], and E[X^2] = (m (F + B))^2 + a^2 m (F^2 + B^2)."""
    microbatches, samples = 6, 40_000
    schedule = build_schedule("afab", ranks=1, microbatches=microbatches)
    found = of(jitter, schedule, samples)
    mean_s, squares = microbatches * 2.5, microbatches * (1.0 + 1.5**2)
    second = (mean_s**2 + jitter.action**2 * squares) * (1 + jitter.rank**2) * (1 + jitter.step**2)
    variance = second - mean_s**2
    assert found.mean_s == pytest.approx(mean_s, abs=5 * math.sqrt(variance / samples))
    fourth = float(((found.makespan_s - mean_s) ** 4).mean())
    assert found.std_s**2 == pytest.approx(variance, abs=5 * math.sqrt((fourth - variance**2) / samples))


def test_the_later_of_two_ranks_counts() -> None:
    """Two microbatches forward through two ranks take A + max(B, C) + D, and of two independent log-normal factors of
    mean 1 the larger has the mean 2 Phi(sigma / sqrt(2))."""
    relative, samples = 0.5, 40_000
    schedule = build_schedule("afab", ranks=2, microbatches=2).forward_only()
    found = monte_carlo(schedule, [COST] * 2, jitter=Jitter(action=relative), samples=samples)
    sigma = math.sqrt(math.log(1 + relative**2))
    expected_s = 2 + 2 * NormalDist().cdf(sigma / math.sqrt(2))
    assert found.mean_s == pytest.approx(expected_s, abs=5 * found.standard_error_s)
    assert found.standard_error_s < 0.005


@pytest.mark.parametrize("kind", ["action", "rank", "message"])
def test_more_jitter_makes_the_mean_step_longer(kind: str) -> None:
    """The makespan is convex in what actions and messages take, so a wider spread about the same means raises it."""
    schedule = build_schedule("1f1b", ranks=4, microbatches=8)
    means = [of(Jitter(**{kind: relative}), schedule, 2000).mean_s for relative in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert means == sorted(means)
    assert means[0] == simulate(schedule, [COST] * 4, network=NETWORK).makespan_s
    assert means[-1] > 1.01 * means[0]


def test_hiccups_only_prolong() -> None:
    calm_s = simulate(ONE_F_ONE_B, [COST] * 3, network=NETWORK).makespan_s
    found = of(Jitter(hiccup_probability=0.05, hiccup_s=2.0), samples=500)
    assert (found.makespan_s >= calm_s).all()
    none = 0.95 ** len(ONE_F_ONE_B.program.stage)
    error = math.sqrt(none * (1 - none) / 500)
    assert (found.compute_s.sum(axis=1) == 3 * 5 * 2.5).mean() == pytest.approx(none, abs=5 * error)


def test_slow_ranks_and_slow_links_are_slow_in_every_sample() -> None:
    plain = of(Jitter(action=0.05))
    slow = of(Jitter(action=0.05), slow_ranks={1: 2.0})
    assert slow.compute_s[:, 1] == pytest.approx(2 * plain.compute_s[:, 1])
    assert slow.compute_s[:, 0] == pytest.approx(plain.compute_s[:, 0])
    assert (slow.makespan_s > plain.makespan_s).all()
    slower = monte_carlo(
        ONE_F_ONE_B, [COST] * 3, network=NETWORK.slowed({(0, 1): 8.0}), jitter=Jitter(action=0.05), samples=50
    )
    assert (slower.makespan_s > plain.makespan_s).all()
    assert slower.trace(0).message_bytes.tolist() == plain.trace(0).message_bytes.tolist()


def test_windows_and_reductions_hold_in_every_sample() -> None:
    reduction = Reduction(replicas=4, bytes_per_s=16)
    schedule = build_schedule("afab", ranks=2, microbatches=4)
    options = {"network": Network(latency_s=2.0), "jitter": ALL, "samples": 50, "reduction": reduction}
    narrow, by_simpy = (
        monte_carlo(schedule, [COST] * 2, receive_window=1, engine=engine, **options)
        for engine in ("compiled", "simpy")
    )
    assert narrow.step_s.tolist() == by_simpy.step_s.tolist()
    for sample in range(5):
        trace = narrow.trace(sample)
        assert (trace.makespan_s, trace.step_s) == (narrow.makespan_s[sample], narrow.step_s[sample])
    assert (narrow.step_s > narrow.makespan_s).all()
    wide = monte_carlo(schedule, [COST] * 2, **options)
    assert (narrow.makespan_s > wide.makespan_s).all()  # each message waits for its receive, and takes two seconds then
    forward = of(ALL, schedule.forward_only(), reduction=reduction)
    assert forward.step_s.tolist() == forward.makespan_s.tolist()


def test_shared_devices_run_on_simpys_clock() -> None:
    shared = of(ALL, samples=5, cores=1)
    assert shared.sampler.engine == "simpy"
    assert (shared.makespan_s >= shared.compute_s.sum(axis=1) * (1 - 1e-12)).all()
    assert shared.trace(3).makespan_s == shared.makespan_s[3]
    enough = of(ALL, samples=5, cores=3)
    assert enough.makespan_s.tolist() == of(ALL, samples=5).makespan_s.tolist()
    assert enough.sampler.engine == "compiled"
    with pytest.raises(ValueError, match="use engine='simpy'"):
        of(ALL, samples=5, cores=1, engine="compiled")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples must be a whole number of 1 or more, got 0"),
        ({"samples": 2.0}, "samples must be a whole number, got 2.0"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"threads": 0}, "threads must be a whole number of 1 or more, got 0"),
        ({"engine": "warp"}, "unknown engine 'warp'"),
        ({"slow_ranks": {3: 2.0}}, "slow_ranks has rank 3"),
        ({"network": Network.of(Link(latency_s=1e308))}, "longer than a float holds"),
        ({"reduction": Reduction(replicas=2, latency_s=1.7e308)}, "longer than a float holds"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        monte_carlo(ONE_F_ONE_B, [COST] * 3, **{"jitter": Jitter(message=3.0), "samples": 50, **options})


def test_a_schedule_that_hangs_is_refused() -> None:
    hangs = Schedule.of([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]])
    with pytest.raises(ScheduleError, match="wait for ever"):
        monte_carlo(hangs, [COST] * 2, jitter=Jitter(action=0.1))
