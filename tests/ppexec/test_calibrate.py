"""Calibrate: what is put into a step is found in it, and predicts another schedule's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ppsim
from ppexec import WorkerPool
from ppexec.calibrate import Calibration, calibrate, fit
from ppsim import StageCost
from ppsim.simulate import message_bytes
from tests.ppexec.remote import tiny

COST = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, activation_bytes=0,
                 weight_activation_bytes=0, output_bytes=64)  # fmt: skip
KNOWN = Calibration(
    action_s=30e-6, late_s=0.0, send_s={64: 50e-6}, receive_s={64: 20e-6}, one_way_s={64: 100e-6}
)  # fmt: skip


def predicted(known: Calibration, name: str, ranks: int) -> ppsim.Trace:
    schedule = ppsim.build_schedule(name, ranks=ranks, microbatches=8)
    stages = [COST] * schedule.stages
    sizes = message_bytes(schedule.program, stages)
    return ppsim.simulate(
        schedule,
        stages,
        network=known.network(schedule.program, sizes),
        dispatch_s=known.dispatch_s(schedule.program, sizes, timed=True),
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_was_put_into_a_step_is_found(ranks: int) -> None:
    trace = predicted(KNOWN, "1f1b", ranks)
    found = fit([trace], [COST] * ranks)
    assert found.action_s == pytest.approx(30e-6, abs=1e-9)
    assert found.send_s[64] == pytest.approx(50e-6, abs=1e-9)
    assert found.receive_s[64] == pytest.approx(20e-6, abs=1e-9)
    assert found.one_way_s[64] == pytest.approx(100e-6, abs=1e-9)
    assert found.late_s == pytest.approx(0, abs=1e-9)


def test_actions_that_end_late_are_found() -> None:
    trace = predicted(KNOWN, "1f1b", 2)
    assert fit([trace], [replace(COST, forward_s=0.0099, backward_input_s=0.0099)] * 2).late_s == pytest.approx(1e-4)


def test_dispatch_is_of_each_action_by_its_messages() -> None:
    """Rank 0 of 2, one microbatch: F alone, then B after a send and with a message; rank 1: F with one, B alone."""
    program = ppsim.build_schedule("afab", ranks=2, microbatches=1).program
    dispatch_s = KNOWN.dispatch_s(program, np.array([64, 64]), timed=False)
    assert dispatch_s.tolist() == pytest.approx([30e-6, 100e-6, 50e-6, 30e-6])


def test_sizes_between_are_interpolated() -> None:
    known = Calibration(action_s=0, late_s=0, one_way_s={0: 1.0, 100: 3.0})
    program = ppsim.build_schedule("afab", ranks=2, microbatches=1).program
    network = known.network(program, np.array([50, 50]))
    assert network.link(0, 1).latency_s == network.link(1, 0).latency_s == pytest.approx(2.0)


@pytest.mark.parametrize("window", [0, 1])
def test_ranks_are_calibrated_whatever_their_schedule(pool: WorkerPool, window: int) -> None:
    config = tiny(schedule="afab", receive_window=window)
    found = calibrate(config, [64, 128], pool=pool, action_s=1e-4, steps=2)
    assert list(found.one_way_s) == [64, 128]
    assert 0 < found.action_s < 1
    assert set(found.to_dict()) == {"action_s", "late_s", "send_s", "receive_s", "one_way_s"}


def test_a_single_rank_has_no_messages_whatever_its_stages_hand_over(pool: WorkerPool) -> None:
    """Cause of a bug: two stages on one rank hand over bytes, but nothing is sent that could be timed."""
    found = calibrate(tiny(ranks=1, layers=2), [8], pool=pool, action_s=0.0005, steps=2)
    assert (found.one_way_s, found.send_s) == ({0: 0.0}, {0: 0.0})
    assert found.action_s > 0
