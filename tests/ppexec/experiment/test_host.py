"""Host: a step that is launched more slowly than it is computed takes as long as the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

import ppsim
from ppexec import RunConfig, WorkerPool
from ppexec.experiment.experiment import predict_and_measure
from ppexec.experiment.host import with_host
from ppexec.machine.threaded import ThreadedDevice
from ppexec.workers.worker import Worker
from ppsim import Conditions, StageCost
from tests.support.remote import tiny

UNIT = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)


def local(**changes: Any) -> RunConfig:
    return tiny(**{"backend": "local", "device": "threads", **changes}).plain()


def step_s(config: RunConfig, launch_s: float, options: dict[str, Any] | None = None) -> tuple[float, float]:
    """A step with this much for each launch, and its delay."""
    options = {"conditions": Conditions()} | (options or {})
    stages = [UNIT] * config.pipeline.stages
    options, delay = with_host(config, stages, [launch_s] * config.pipeline.program.actions, options)
    step = ppsim.simulate(config.pipeline, stages, **options)
    assert step.start_s.min() >= 0
    return float(step.end_s.max()), delay


def test_a_fast_host_changes_nothing() -> None:
    config = local(schedule="afab", ranks=1, layers=1, microbatches=4)
    assert step_s(config, 0.0) == (12.0, 0.0)
    assert step_s(config, 1e-3)[0] == pytest.approx(12.0)  # the first launch is under way while its kernels run


def test_a_slow_host_sets_the_pace_of_one_rank() -> None:
    """Actions of 1 and 2 seconds, launched in 4 each."""
    end_s, delay = step_s(local(schedule="afab", ranks=1, layers=1, microbatches=4), 4.0)
    assert end_s == pytest.approx(8 * 4.0)
    assert delay == pytest.approx((32 - 3) / 12 - 1)  # measured from the first action's start, at 3


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_ranks_of_one_process_share_a_host_and_others_have_their_own(schedule: str) -> None:
    shared = local(schedule=schedule, ranks=2, layers=4)
    own = tiny(schedule=schedule, ranks=2, layers=4, device="threads").plain()
    actions = shared.pipeline.program.actions
    assert step_s(shared, 10.0)[0] == pytest.approx(10.0 * actions)
    assert step_s(own, 10.0)[0] < 10.0 * actions * 0.8
    assert step_s(own, 10.0)[0] >= 10.0 * actions / 2


def test_the_host_is_only_so_far_ahead_of_a_rank() -> None:
    """Rank 1 computes nothing before rank 0's first output, but the host launches on: no rank waits for another's."""
    config = local(schedule="afab", ranks=2, layers=2, microbatches=40)
    assert step_s(config, 0.01)[1] == pytest.approx(0.0, abs=0.02)


def test_ranks_that_share_a_gpu_wait_for_the_host_too() -> None:
    config = local(schedule="1f1b", ranks=2, layers=2, microbatches=4)
    options = {"sharing": "fair", "speeds": (1.0, 0.6)}
    assert step_s(config, 10.0, options)[0] == pytest.approx(160.0)
    assert step_s(config, 0.01, options) == (step_s(config, 0.0, options)[0], pytest.approx(-0.28, abs=0.2))


class HerePool:
    """Stands in for a pool: one worker, in this process, so that a test can change its device."""

    process_ids: Sequence[int] = ()

    def set_up(self, config: RunConfig, costs: Any) -> None:
        self.worker = Worker(config, costs)

    def call(self, count: int, task: Callable[..., Any], **arguments: Any) -> list[Any]:
        return [task(self.worker, **arguments)]


@pytest.mark.parametrize(("launch_s", "is_host_bound"), [(2e-3, True), (0.0, False)])
def test_a_host_that_launches_slowly_is_predicted_and_named(
    monkeypatch: pytest.MonkeyPatch, launch_s: float, is_host_bound: bool
) -> None:
    """Small kernels, and a device on which each costs the host 2 ms."""
    device = ThreadedDevice(launch_s=launch_s)
    monkeypatch.setattr("ppexec.workers.worker.make_device", lambda config: device)
    size = {"hidden": 16, "seq": 2} if is_host_bound else {"hidden": 256, "seq": 128}
    config = local(schedule="1f1b", ranks=2, layers=2, microbatches=4, steps=3, **size)
    outcome = predict_and_measure(config, pool=cast(WorkerPool, HerePool()), verify=False)
    device.close()
    assert outcome.launch_s is not None
    assert len(outcome.launch_s) == config.pipeline.program.actions
    if is_host_bound:
        assert outcome.is_host_bound
        # The host launches actions and messages one after another; each takes it at least `launch_s`.
        least_s = 0.99 * launch_s * (config.pipeline.program.actions + len(config.pipeline.program.messages))
        assert sum(outcome.launch_s) >= least_s
        assert outcome.predicted.makespan_s > 0.9 * least_s
        assert min(outcome.step_times_s) > 0.9 * least_s
    else:
        assert outcome.host_delay < 0.2  # the interpreter's lock lets kernels in threads wait for the host a little


def test_a_rank_that_is_the_host_has_no_launches() -> None:
    from ppexec import Session

    with Session(tiny()) as session:
        assert session.time_launches(1) is None
