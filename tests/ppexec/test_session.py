"""Session and the three functions of the API: set up once, asked as often as wanted."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ppexec
import ppsim
from ppexec import Model, RunConfig, Session, WorkerPool
from ppexec.cli import Profile
from tests.support.remote import tiny


def test_a_run_is_the_median_step_with_its_bytes_and_where_it_was_made(pool: WorkerPool, tmp_path: Path) -> None:
    config = tiny(steps=3, warmup=1)
    trace = ppexec.run(config, pool=pool)
    times_s = trace.details["step_times_s"]
    assert len(times_s) == 3
    assert trace.makespan_s == sorted(times_s)[1]
    assert 0 <= trace.bubble_fraction < 1
    assert trace.peak_activation_bytes.shape == (2,)
    assert (trace.peak_activation_bytes > 0).all()
    assert trace.details["config"] == config.to_dict()
    environment = trace.details["environment"]
    assert (environment["ranks"], environment["threads_per_rank"], environment["backend"]) == (2, 1, "gloo")
    assert environment["cores"] >= 1
    path = tmp_path / "trace.npz"
    trace.save(path)
    loaded = ppsim.Trace.load(path)
    assert loaded.details == json.loads(json.dumps(trace.details))
    assert np.array_equal(loaded.start_s, trace.start_s)


def test_an_experiment_predicts_what_it_measures() -> None:
    outcome = ppexec.predict_and_measure(tiny(steps=2))
    assert isinstance(outcome, ppexec.Outcome)
    assert len(outcome.measured) == 2
    assert outcome.predicted.makespan_s > 0
    assert outcome.predicted.peak_activation_bytes.tolist() == outcome.median.peak_activation_bytes.tolist()
    assert outcome.verified is not None
    assert outcome.verified.passed
    assert json.loads(json.dumps(outcome.summary()))["memory"]["equal_at_every_action"]


def test_a_measured_trace_has_the_rows_of_a_simulated_one(pool: WorkerPool) -> None:
    measured = ppexec.run(tiny(), pool=pool).to_frame()
    cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    predicted = ppsim.simulate(tiny().pipeline, [cost, cost]).to_frame()
    assert measured.columns.tolist() == predicted.columns.tolist()
    key = ["rank", "stage", "kind", "microbatch"]
    assert sorted(map(tuple, measured[key].to_numpy())) == sorted(map(tuple, predicted[key].to_numpy()))


def test_an_evaluation_runs(pool: WorkerPool) -> None:
    trace = ppexec.run(tiny(forward_only=True), pool=pool)
    assert set(trace.to_frame()["kind"]) == {"F", "SEND_F", "RECV_F"}
    assert trace.peak_activation_bytes.tolist() == [0, 0]


def test_one_session_measures_counts_probes_profiles_and_verifies(pool: WorkerPool) -> None:
    with Session(tiny(), pool=pool) as session:
        assert len(session.measure(2)) == 2
        assert [len(levels) for levels in session.count_memory()] == [8, 8]
        network = session.probe_network()
        assert len(session.profile(1).layers) == 4
        assert session.verify().passed
    assert set(network.links) == {(0, 1), (1, 0)}
    assert all(link.latency_s > 0 for link in network.links.values())


def test_a_step_is_the_same_however_often_it_is_measured(pool: WorkerPool) -> None:
    with Session(tiny(), pool=pool) as session:
        first, again = session.count_memory(), session.count_memory()
    assert first == again


def test_without_a_pool_a_session_has_one_of_its_own_and_ends_it() -> None:
    with Session(tiny(ranks=1)) as session:
        assert session.verify().passed
        own = session._own_pool
        assert own is not None
        assert len(own.process_ids) == 1
    assert own.process_ids == []


def test_a_commands_own_flags_do_not_reach_the_workers(pool: WorkerPool) -> None:
    values = {name: value for name, value in tiny().to_dict().items() if name not in ("from_csv", "costs")}
    with Session(Profile(**values, json=True), pool=pool) as session:
        assert type(session.config) is RunConfig
        assert session.verify().passed


def test_few_microbatches_warn_when_a_run_is_set_up(pool: WorkerPool) -> None:
    with pytest.warns(UserWarning, match="3 microbatches over 2 ranks are fewer than 2 x ranks = 4"):
        ppexec.verify(tiny(microbatches=3), pool=pool)


def test_what_this_machine_cannot_hold_is_refused_with_both_sizes(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match=r"parameters and gradients of 4 layers take [\d.]+ GiB, this machine has"):
        ppexec.verify(tiny(hidden=2**20, intermediate=2**20), pool=pool)


def test_a_microbatch_that_memory_does_not_hold_is_an_error_of_its_size(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="can't allocate memory"):
        ppexec.verify(tiny(seq=2**30, micro_batch_size=2**15), pool=pool)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_dtype_runs_and_is_bit_equal(pool: WorkerPool, dtype: str) -> None:
    assert ppexec.verify(tiny(dtype=dtype), pool=pool).passed


@pytest.mark.parametrize("threads", [1, 2])
def test_the_reference_has_the_workers_number_of_threads(pool: WorkerPool, threads: int) -> None:
    """Large enough to be shared out: sums over two threads are other sums."""
    report = ppexec.verify(tiny(threads=threads, hidden=96, intermediate=200, seq=40, microbatches=4), pool=pool)
    assert report.gradients_bit_equal


def test_a_schedule_from_a_file_runs(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(ppsim.build_schedule("1f1b", ranks=2, microbatches=5).to_csv())
    assert ppexec.verify(RunConfig(from_csv=path, layers=2, hidden=4, seq=1, threads=1), pool=pool).passed


def odd_data(config: RunConfig) -> Model:
    """Data without a number in two microbatches."""
    return Model(
        layers=[nn.Linear(4, 4) for _ in range(config.layers)],
        sample=lambda index: (torch.full((2, 4), math.nan if index in (2, 9) else 1.0), torch.zeros(2, 4)),
        loss=nn.functional.mse_loss,
    )


def test_a_loss_that_is_no_number_is_said_with_its_microbatch(pool: WorkerPool) -> None:
    """A run went through in silence, and a verification called NaN and NaN bit-equal."""
    config = tiny(model="tests.ppexec.test_session:odd_data", microbatches=4, micro_batch_size=1, steps=3, warmup=0)
    said = r"the loss of microbatch \d \(from sample 2 on\) in step 0 is nan"
    with Session(config, pool=pool) as session:
        with pytest.warns(UserWarning, match=said + r" \(1 more such losses\): its gradients are no finite numbers"):
            session.measure(3)
        with pytest.warns(UserWarning, match=said + ": its gradients are no finite numbers"):
            session.verify()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            session.measure(1, first_step=1)
