"""Costs of runs: known costs come back, other schedules of the job are predicted, a real run within its noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ppsim
from ppsim import (
    InputError,
    Jitter,
    Network,
    Run,
    StageCost,
    Trace,
    build_schedule,
    costs_of,
    monte_carlo,
    read_run,
    simulate,
)
from ppsim.runs.durations import edge_rows
from ppsim.runs.own import write_run
from ppsim.schedule.action import Kind
from ppsim.simulation.timed_program import row_durations
from tests.support.primus import PUBLISHED, apart, write_primus

GIB = 2**30


def _costs(stages: int) -> list[StageCost]:
    return [
        StageCost(
            forward_s=1.0 + 0.03 * (stage % 5),
            backward_input_s=0.7,
            backward_weight_s=0.7,
            backward_s=1.4 + 0.02 * (stage % 3),
            activation_bytes=3 * GIB,
            weight_activation_bytes=3 * GIB,
        )
        for stage in range(stages)
    ]


def _bare(trace: Trace, **columns: object) -> Trace:
    """What a log of computations keeps of a simulated step."""
    return Trace(program=trace.program, clock="measured", start_s=trace.start_s, end_s=trace.end_s, **columns)


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "afab", "zb-h1"])
@settings(max_examples=10)
@given(send_s=st.floats(0, 0.05))
def test_costs_are_found_again(name: str, send_s: float) -> None:
    """Blocking sends too, whatever they take; and a step of the run's own schedule comes out."""
    schedule = build_schedule(name, ranks=4, microbatches=8)
    costs = _costs(schedule.stages)
    step = simulate(schedule, costs, send_s=send_s)
    found = costs_of(Run(traces=[_bare(step)] * 3, steps=[0, 1, 2]))
    for cost, true in zip(found, costs, strict=True):
        assert cost.forward_s == pytest.approx(true.forward_s)
        if name == "zb-h1":
            assert (cost.backward_input_s, cost.backward_weight_s) == pytest.approx((0.7, 0.7))
        else:
            assert cost.full_backward_s == pytest.approx(true.full_backward_s)
    assert found.predict().makespan_s == pytest.approx(step.makespan_s, rel=1e-3)
    assert not found.knows_activations
    assert found.predict().peak_activation_bytes is None


@settings(max_examples=10)
@given(send_s=st.floats(0, 0.02), name=st.sampled_from(["afab", "1f1b", "zb-h1"]))
def test_another_schedule_of_the_job_is_predicted(send_s: float, name: str) -> None:
    costs = _costs(4)
    run = Run(
        traces=[_bare(simulate(build_schedule("1f1b", ranks=4, microbatches=8), costs, send_s=send_s))], steps=[0]
    )
    other = build_schedule(name, ranks=4, microbatches=8)
    halves = [
        replace(cost, backward_input_s=cost.backward_s / 2, backward_weight_s=cost.backward_s / 2) for cost in costs
    ]
    true = simulate(other, halves, send_s=send_s)
    assert costs_of(run).predict(other).makespan_s == pytest.approx(true.makespan_s, rel=0.01)


@pytest.mark.parametrize("chunks", [2, 4])
def test_stages_are_cut_with_embedding_and_head_apart(chunks: int) -> None:
    """Layers of 0.25 s, 4 a rank; an embedding of 0.125 s and a head of 0.5 s (half of it backward again)."""

    def layered(stages: int) -> list[StageCost]:
        inner = 16 / stages * 0.25
        ends = {0: 0.125, stages - 1: 0.5}
        return [
            StageCost(
                forward_s=inner + ends.get(stage, 0.0),
                backward_input_s=inner + ends.get(stage, 0.0),
                backward_weight_s=inner + ends.get(stage, 0.0),
                backward_s=2 * (inner + ends.get(stage, 0.0)),
            )
            for stage in range(stages)
        ]

    run = Run(traces=[simulate(build_schedule("1f1b", ranks=4, microbatches=8), layered(4))], steps=[0])
    for name in ("interleaved-1f1b", "zb-v") if chunks == 2 else ("interleaved-1f1b",):
        schedule = build_schedule(name, ranks=4, microbatches=8, stages_per_rank=chunks)
        assert costs_of(run).predict(schedule).makespan_s == pytest.approx(
            simulate(schedule, layered(4 * chunks)).makespan_s
        )


def test_a_last_backward_and_a_first_forward_have_their_own_cost() -> None:
    schedule = build_schedule("1f1b", ranks=4, microbatches=8)
    program, costs = schedule.program, _costs(4)
    lengths_s = row_durations(program, costs)
    first, last = edge_rows(program)
    assert [str(program.action_of(row)) for row in first] == ["0F0", "1F0", "2F0", "3F0"]
    assert [str(program.action_of(row)) for row in last] == ["0B7", "1B7", "2B7", "3B7"]
    lengths_s[last[0]] += 0.5
    lengths_s[first[2]] += 0.25
    run = Run(traces=[_bare(simulate(schedule, costs, durations_s=lengths_s))], steps=[0])
    found = costs_of(run)
    assert found.durations.last_backward_s == pytest.approx([0.5, 0, 0, 0])
    assert found.durations.first_forward_s == pytest.approx([0, 0, 0.25, 0])
    assert found.predict().makespan_s == pytest.approx(run.traces[0].makespan_s)
    afab = build_schedule("afab", ranks=4, microbatches=8)
    extra = found.durations_for(afab) - row_durations(afab.program, costs)
    assert sorted(extra[np.abs(extra) > 1e-9].tolist()) == pytest.approx([0.25, 0.5])


def test_a_disturbed_step_moves_little() -> None:
    schedule, costs = build_schedule("1f1b", ranks=4, microbatches=8), _costs(4)
    calm = simulate(schedule, costs)
    slow = simulate(schedule, [replace(each, forward_s=3 * each.forward_s) for each in costs])
    found = costs_of(Run(traces=[_bare(calm), _bare(calm), _bare(slow)], steps=[0, 1, 2]))
    assert found.predict().makespan_s == pytest.approx(calm.makespan_s)
    assert found.step_spread == 0.0


def test_spread_is_that_of_the_actions() -> None:
    """Normal deviations of 2 % are found as such, and a step of other deviations is predicted to within them."""
    schedule, costs = build_schedule("1f1b", ranks=4, microbatches=32), _costs(4)
    dice = np.random.default_rng(7)
    steps = [
        simulate(schedule, costs, durations_s=row_durations(schedule.program, costs) * dice.normal(1, 0.02, 256))
        for _ in range(20)
    ]
    found = costs_of(Run(traces=[_bare(each) for each in steps], steps=range(20)))
    for spread, cost in zip(found.spread, costs, strict=True):
        assert spread["F"] == pytest.approx(0.02 * cost.forward_s, rel=0.2)
        assert spread["B"] == pytest.approx(0.02 * cost.full_backward_s, rel=0.2)
    expected_s = monte_carlo(schedule, costs, jitter=Jitter(action=0.02), samples=200, seed=1).mean_s
    assert found.predict().makespan_s == pytest.approx(expected_s, rel=0.03)


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b"])
def test_memory_is_fitted_from_peaks(tmp_path: Path, name: str) -> None:
    """40 GiB besides on every rank, 2 more with the embedding and 1 with the head."""
    schedule = build_schedule(name, ranks=4, microbatches=8)
    besides = np.array([42, 40, 40, 41]) * GIB
    costs = _costs(schedule.stages)

    def peaks(other) -> np.ndarray:
        scale = schedule.stages / other.stages
        lean = [
            replace(cost, activation_bytes=int(3 * GIB * scale), weight_activation_bytes=int(3 * GIB * scale))
            for cost in _costs(other.stages)
        ]
        return simulate(other, lean).peak_activation_bytes + besides

    step = simulate(schedule, costs)
    write_primus(
        [
            replace(
                step, activation_bytes=None, gradient_bytes=None, parameter_bytes=None, total_peak_bytes=peaks(schedule)
            )
        ],
        tmp_path,
        behind_s=apart(4),
    )
    found = costs_of(read_run(tmp_path))
    assert [cost.activation_bytes for cost in found] == [3 * GIB] * schedule.stages
    assert found.memory.other_bytes.tolist() == besides.tolist()
    assert found.predict().memory.total_bytes.tolist() == peaks(schedule).tolist()
    if name == "1f1b":
        for other in (
            build_schedule("afab", ranks=4, microbatches=8),
            build_schedule("interleaved-1f1b", ranks=4, microbatches=8),
        ):
            assert found.predict(other).memory.total_bytes.tolist() == peaks(other).tolist()


def test_equal_peaks_tell_nothing_of_a_microbatch() -> None:
    schedule = build_schedule("afab", ranks=4, microbatches=8)
    step = _bare(simulate(schedule, _costs(4)), total_peak_bytes=np.full(4, 50 * GIB))
    found = costs_of(Run(traces=[step], steps=[0]))
    assert found.memory.activation_bytes is None
    assert not found.knows_activations


def test_known_activations_are_taken_over() -> None:
    schedule = build_schedule("zb-h1", ranks=4, microbatches=8)
    costs = [replace(cost, weight_activation_bytes=GIB, output_bytes=17) for cost in _costs(4)]
    found = costs_of(Run(traces=[simulate(schedule, costs)], steps=[0]))
    assert [(each.activation_bytes, each.weight_activation_bytes) for each in found] == [(3 * GIB, GIB)] * 4
    assert [each.output_bytes for each in found] == [17, 17, 17, 0]


def test_an_overlap_is_found() -> None:
    schedule = build_schedule("dualpipe-v", ranks=4, microbatches=8)
    step = simulate(schedule, _costs(8), overlap=0.75)
    found = costs_of(Run(traces=[_bare(step)], steps=[0]))
    assert found.durations.overlap == pytest.approx(0.75, rel=1e-6)
    assert found.predict().makespan_s == pytest.approx(step.makespan_s, rel=1e-6)


def test_another_number_of_ranks_is_refused() -> None:
    run = Run(traces=[simulate(build_schedule("1f1b", ranks=4, microbatches=8), _costs(4))], steps=[0])
    with pytest.raises(InputError, match="run has 4 ranks and the schedule 2"):
        costs_of(run).predict(build_schedule("1f1b", ranks=2, microbatches=8))


def test_steps_of_two_schedules_are_no_run() -> None:
    traces = [simulate(build_schedule(name, ranks=2, microbatches=4), _costs(2)) for name in ("1f1b", "afab")]
    with pytest.raises(InputError, match="step 1 runs another order on rank 0"):
        Run(traces=traces, steps=[0, 1])


# The published run: its first two steps are warm-up, 16 and 18 disturbed.
CALM = [step for step in range(3, 21) if step not in (16, 18)]


def test_a_published_step_follows_from_its_own_durations() -> None:
    run = read_run(PUBLISHED)
    costs = costs_of(run)
    off = [abs(costs.predict(durations_s=t.end_s - t.start_s).makespan_s / t.makespan_s - 1) for t in run.traces[2:]]
    assert np.median(off) < 0.002
    assert max(off) < 0.005


def test_a_published_step_follows_from_the_others() -> None:
    run = read_run(PUBLISHED)
    off = {}
    for step in CALM:
        others = costs_of(run.only([each for each in run.steps if each != step]))
        off[step] = abs(others.predict().makespan_s / run.only([step]).traces[0].makespan_s - 1)
    assert np.median(list(off.values())) < 0.01
    assert max(off.values()) < 0.02


def test_published_memory_is_on_a_line() -> None:
    run = read_run(PUBLISHED)
    found = costs_of(run)
    measured = np.max([trace.total_peak_bytes for trace in run.traces], axis=0)
    assert found.predict().memory.total_bytes == pytest.approx(measured, rel=0.01)
    # As one reads it off the files: 7.47 GiB a microbatch, 43.2 besides.
    assert found[3].activation_bytes / GIB == pytest.approx(7.47, abs=0.02)
    assert found.memory.other_bytes[3] / GIB == pytest.approx(43.23, abs=0.05)


def test_published_costs_tell_what_is_special() -> None:
    found = costs_of(read_run(PUBLISHED))
    assert found.durations.last_backward_s[0] == pytest.approx(0.018, abs=0.001)
    assert (found.durations.last_backward_s[1:] == 0).all()
    assert found.handover.after_s[3, Kind.B] == pytest.approx(0.00078, abs=5e-5)
    assert found.handover.after_s[0, Kind.B] == pytest.approx(0.0, abs=5e-5)  # the first stage sends nothing back
    assert found.step_spread < 0.005


def test_network_of_a_run_with_latency() -> None:
    """Messages that travel while their sender goes on are told from sends that block it."""
    schedule, costs = build_schedule("1f1b", ranks=4, microbatches=8), _costs(4)
    step = simulate(schedule, costs, network=Network(latency_s=0.125))
    found = costs_of(Run(traces=[_bare(step)], steps=[0]))
    assert set(np.round(list(found.handover.latency_s.values()), 6)) == {0.125}
    assert np.abs(found.handover.after_s).max() < 1e-9
    assert found.predict().makespan_s == pytest.approx(step.makespan_s)


def test_a_folder_holds_the_steps_of_the_last_run_alone(tmp_path: Path) -> None:
    """Steps of an earlier import were read as steps of this job."""
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    long, short = (simulate(build_schedule("1f1b", ranks=2, microbatches=m), [cost] * 2) for m in (8, 4))
    write_run(Run(traces=[long] * 3, steps=[0, 1, 2]), tmp_path)
    write_run(Run(traces=[short], steps=[0]), tmp_path)
    found = read_run(tmp_path)
    assert found.steps == (0,)
    assert found.median.makespan_s == short.makespan_s


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v"])
def test_microbatches_that_differ_have_costs_of_their_own(name: str) -> None:
    """A step of microbatches of different length follows from them, and does not from the stages' medians."""
    schedule = ppsim.build_schedule(name, ranks=3, microbatches=5)
    given = [
        [
            ppsim.StageCost(forward_s=n, backward_input_s=1.5 * n, backward_weight_s=0.5 * n + 0.25 * stage)
            for n in (1.0, 4.0, 2.0, 1.0, 3.0)
        ]
        for stage in range(schedule.stages)
    ]
    trace = ppsim.simulate(schedule, given)
    found = ppsim.costs_of(ppsim.Run(traces=[trace, trace, trace], steps=[0, 1, 2])).by_microbatch
    for mine, theirs in zip(found, given, strict=True):
        assert [each.forward_s for each in mine] == pytest.approx([each.forward_s for each in theirs])
        assert [each.full_backward_s for each in mine] == pytest.approx([each.full_backward_s for each in theirs])
    assert ppsim.simulate(schedule, found).makespan_s == pytest.approx(trace.makespan_s)
    medians = ppsim.costs_of(ppsim.Run(traces=[trace], steps=[0]))
    assert ppsim.simulate(schedule, list(medians)).makespan_s != pytest.approx(trace.makespan_s, rel=0.01)
