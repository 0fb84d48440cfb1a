"""Calibrate: what is put into steps is found in them, and predicts another schedule's."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

import ppsim
from ppexec import Session, WorkerPool
from ppexec.calibrate.calibration import Calibration, fit
from ppexec.calibrate.known_run import known_runs
from ppsim import Jitter, StageCost, Trace
from ppsim.simulation.timed_program import message_bytes
from tests.support.remote import tiny

COST = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, activation_bytes=0,
                 weight_activation_bytes=0, output_bytes=64)  # fmt: skip
KNOWN = Calibration(
    action_s=30e-6, receive_s={64: 20e-6, 128: 25e-6}, send_s={64: 50e-6, 128: 70e-6}, one_way_s={64: 1e-4, 128: 3e-4}
)


def stepped(known: Calibration, name: str, ranks: int, cost: StageCost = COST, jitter: Jitter | None = None) -> Trace:
    """A step of this schedule in which running costs what is known, or what a seeded sample has of it."""
    schedule = ppsim.build_schedule(name, ranks=ranks, microbatches=8)
    stages = [cost] * schedule.stages
    options = known.options(schedule.program, message_bytes(schedule.program, stages))
    if jitter is None:
        return ppsim.simulate(schedule, stages, **options)
    return ppsim.monte_carlo(schedule, stages, jitter=jitter, samples=1, **options).trace(0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_was_put_into_steps_is_found(ranks: int) -> None:
    """By size, from both kinds of known run at once."""
    large = replace(COST, output_bytes=128)
    found = fit(
        [(stepped(KNOWN, name, ranks, cost), [cost] * ranks) for name in ("1f1b", "zb-h1") for cost in (COST, large)]
    )
    assert found.action_s == pytest.approx(30e-6, abs=1e-9)
    for name in ("receive_s", "send_s", "one_way_s"):
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), abs=1e-9), name
    assert found.late_s == pytest.approx(0, abs=1e-9)
    assert found.dispatch_factors == pytest.approx(1, abs=1e-4)
    assert found.message_factors == pytest.approx(1, abs=1e-4)


def test_what_varies_is_found_with_its_share() -> None:
    """Every tenth message takes ten times as long, every fifth action ends 2 ms late."""
    jitter = Jitter(factors=MappingProxyType({"message": np.array([1.0] * 9 + [10.0])}), late_s=[0.0] * 4 + [2e-3])
    found = fit([(stepped(KNOWN, "zb-h1", 4, jitter=jitter), [COST] * 4) for _ in range(1)])
    assert np.unique(found.late_s.round(6)).tolist() == [0.0, 2e-3]
    assert (found.late_s > 1e-3).mean() == pytest.approx(0.2, abs=0.15)
    assert found.message_factors.max() / found.message_factors.min() == pytest.approx(10, rel=0.01)
    assert found.message_factors.mean() == pytest.approx(1)
    drawn = found.jitter(timed=True)
    assert not drawn.is_calm
    assert len(found.jitter(timed=False).to_dict()["factors"]) == 2
    assert "late_s" not in found.jitter(timed=False).to_dict()


def test_a_step_that_others_disturbed_does_not_count() -> None:
    slow = replace(KNOWN, action_s=5e-3)
    quiet, disturbed = stepped(KNOWN, "1f1b", 2), stepped(slow, "1f1b", 2)
    stages = [COST] * 2
    same = [replace(each, program=quiet.program) for each in (quiet, quiet, quiet, disturbed)]
    assert fit([(each, stages) for each in same]).action_s == pytest.approx(30e-6, abs=1e-9)


def test_dispatch_and_sending_are_of_each_action_by_its_messages() -> None:
    """Rank 0 of 2, one microbatch: F sends, then B takes a message; rank 1: F takes one, B sends."""
    program = ppsim.build_schedule("afab", ranks=2, microbatches=1).program
    options = KNOWN.options(program, np.array([64, 64]))
    assert options["conditions"].dispatch_s.tolist() == pytest.approx([30e-6, 50e-6, 50e-6, 30e-6])
    assert options["conditions"].send_s.tolist() == pytest.approx([50e-6, 0, 0, 50e-6])


def test_sizes_between_are_interpolated() -> None:
    program = ppsim.build_schedule("afab", ranks=2, microbatches=1).program
    network = Calibration(one_way_s={0: 1.0, 100: 3.0}).options(program, np.array([50, 50]))["network"]
    assert network.link(0, 1).latency_s == network.link(1, 0).latency_s == pytest.approx(2.0)


def test_pairs_are_refused() -> None:
    schedule = ppsim.build_schedule("dualpipe-v", ranks=2, microbatches=8)
    trace = ppsim.simulate(schedule, [COST] * 4)
    with pytest.raises(ValueError, match="without overlapped pairs"):
        fit([(trace, [COST] * 4)])


@pytest.mark.parametrize("window", [0, 1])
def test_ranks_are_calibrated_whatever_their_schedule(pool: WorkerPool, window: int) -> None:
    with Session(tiny(schedule="afab", receive_window=window), pool=pool) as session:
        found = session.calibrate([64, 128], action_s=1e-4, rounds=1)
        assert session.verify().gradients_bit_equal  # and what is calibrated in runs on
    assert list(found.one_way_s) == list(found.send_s) == list(found.receive_s) == [64, 128]
    assert 0 <= found.action_s < 1  # a fit's share: noise may leave none
    assert len(found.late_s) == 2 * 2 * 8 * (2 + 3)  # sizes, ranks, microbatches; F and B, or F, I and W
    assert found.to_dict()["late_s"]["count"] == len(found.late_s)


def test_a_single_rank_has_no_messages_whatever_its_stages_hand_over(pool: WorkerPool) -> None:
    """Cause of a bug: two stages on one rank hand over bytes, but nothing is sent that could be timed."""
    with Session(tiny(ranks=1, layers=2), pool=pool) as session:
        found = session.calibrate([8], action_s=0.0005, rounds=1)
    assert (found.one_way_s, found.send_s, found.receive_s) == ({0: 0.0}, {0: 0.0}, {0: 0.0})
    assert found.action_s > 0


def test_known_runs_have_as_many_stages_a_rank_as_what_runs_and_three_sizes_at_most() -> None:
    found = known_runs(4, [7, 1, 5, 3, 1], 0.002)
    assert [each.size_bytes for each in found] == [1, 5, 7] * 2
    assert {each.schedule.stages for each in found} == {4}
    several = known_runs(3, [8], 0.002, stages_per_rank=2)
    assert [each.schedule.stages for each in several] == [6, 6]
    assert all(each.schedule.microbatches == 9 for each in several)  # a multiple of the ranks
