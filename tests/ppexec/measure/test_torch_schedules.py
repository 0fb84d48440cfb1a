"""PyTorch's executors as peers: they run on our stages, and a step of each is timed."""

from __future__ import annotations

import pytest

import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppexec.measure.torch_schedules import PEERS
from tests.support.remote import tiny


@pytest.mark.filterwarnings("ignore")
def test_every_executor_is_timed_on_the_same_stages(pool: WorkerPool) -> None:
    config = RunConfig(schedule="1f1b", ranks=2, layers=2, hidden=8, seq=2, microbatches=4, threads=1)
    with Session(config, pool=pool) as session:
        for executor in (None, *PEERS):
            times = session.time_steps(executor, 2)
            assert len(times) == 2
            assert min(times) > 0
        for rounds in session.time_compute(2):
            assert [sorted(values) for values in rounds] == [["backward_s", "forward_s", "whole_s"]] * 2
            assert all(values["whole_s"] >= 4 * values["forward_s"] for values in rounds)  # of four microbatches
        assert session.verify().passed  # peers leave nothing behind
        with pytest.raises(ValueError, match="unknown executor 'torch': known are torch-gpipe"):
            session.time_steps("torch", 1)


@pytest.mark.parametrize("how", ["with_recompute", "with_offload"])
def test_what_pytorch_does_not_know_is_refused_and_a_plain_loop_keeps_activations(
    how: str, pool: WorkerPool, tmp_path
) -> None:
    """Cause of a bug in waiting: the plain loop took an R for a backward."""
    schedule = getattr(ppsim.build_schedule("afab", ranks=2, microbatches=4), how)()
    path = tmp_path / "lighter.csv"
    path.write_text(schedule.to_csv(offload=True))
    with Session(tiny(from_csv=path), pool=pool) as session:
        assert all(samples["backward_s"] > 0 for rank in session.time_compute(1) for samples in rank)
        with pytest.raises(ValueError, match="PyTorch's schedules know no R, O and L"):
            session.time_steps("torch-runtime", 1)
