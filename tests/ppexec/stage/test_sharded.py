"""Sharded stages for real: `fully_shard` over two replicas on gloo, run as the schedule says."""

from __future__ import annotations

import numpy as np
import pytest

from ppexec.config.config import RunConfig
from ppexec.session import Session
from ppsim import Collectives, InputError, Schedule, attribute, simulate

SMALL = {"ranks": 2, "dp": 2, "layers": 8, "hidden": 16, "seq": 4, "micro_batch_size": 1, "threads": 1, "warmup": 0}


@pytest.mark.parametrize(
    ("schedule", "shard", "options"),
    [
        ("interleaved-1f1b", 1, {"stages_per_rank": 2}),
        ("zb-v", 1, {}),
        ("1f1b", 3, {"communication": "late"}),
    ],
)
def test_gradients_are_equal_and_memory_is_as_predicted(schedule: str, shard: int, options: dict[str, object]) -> None:
    config = RunConfig(schedule=schedule, microbatches=4, shard=shard, **SMALL, **options)
    with Session(config) as session:
        report = session.verify()
        assert report.outputs_bit_equal
        assert report.gradients_equal
        assert report.compared > 4
        profile = session.profile(1)
        (trace,) = session.measure(1)
        memory = session.memory()
    pipeline = config.pipeline
    stages = profile.stages
    predicted = simulate(pipeline, stages, collectives=Collectives(replicas=2), engine="compiled")
    assert trace.schedule.sharding == pipeline.sharding
    at = 0
    for rank, held in enumerate(memory):
        rows = slice(at, at + len(held.activation_bytes))
        at = rows.stop
        assert held.parameter_bytes == predicted.parameter_bytes[rank]
        assert held.unsharded_bytes == predicted.unsharded_bytes[rows].tolist()
        assert held.activation_bytes == predicted.activation_bytes[rows].tolist()
        # From one row to the next, whole gradients give way to shares once they are reduced, which is a matter of time.
        assert max(held.gradient_bytes) == predicted.gradient_bytes[rows].max()
    gathered = pipeline.to_csv(sharding=True).count("UNSHARD")
    assert len(trace.unshard_start_s) == gathered
    assert (trace.unshard_end_s >= trace.unshard_start_s).all()
    table = trace.program.collectives
    for row in range(len(trace.start_s)):  # nothing ran on a stage that was not whole
        unshards = np.flatnonzero(table.kind == 9)
        at = int(np.flatnonzero(unshards == table.gather[row])[0])
        assert trace.start_s[row] >= trace.unshard_end_s[at]
    assert len(trace.reduce_end_s) == pipeline.stages
    found = attribute(trace)
    assert sum(found.parts_s.values()) == pytest.approx(trace.bubble_s)


def test_a_file_that_says_unshard_is_sharded_as_it_says(tmp_path) -> None:
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]).with_sharding(1)
    (tmp_path / "file.csv").write_text(schedule.to_csv(messages=True))
    config = RunConfig(from_csv=tmp_path / "file.csv", **(SMALL | {"layers": 2}))
    assert config.is_sharded
    with Session(config) as session:
        report = session.verify()
    assert report.outputs_bit_equal
    assert report.gradients_equal
    assert not RunConfig(from_csv=tmp_path / "file.csv", **(SMALL | {"layers": 2, "dp": 1})).is_sharded


@pytest.mark.parametrize("options", [{"ranks": 2}, {"ranks": 1, "schedule": "interleaved-1f1b", "stages_per_rank": 2}])
def test_tied_weights_on_two_stages_are_added_up_as_shares(options: dict[str, object]) -> None:
    values = {"model": "gpt", "tied": True, "layers": 2, "hidden": 16, "seq": 8, "microbatches": 4, "shard": 1}
    with Session(RunConfig(**(SMALL | values | options))) as session:
        report = session.verify()
    assert report.outputs_bit_equal
    assert report.gradients_equal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dp": 1}, "shard 1 is over data-parallel replicas: take dp 2 or more"),
        ({"tp": 2}, "tp 2 does not go with sharded parameters: take tp 1"),
        ({"device": "threads"}, "device threads does not go with sharded parameters"),
        # A recorded step ended in the workers, where UNSHARD cannot be recorded; timed stages ignored the flag.
        ({"graphs": True}, "graphs True does not go with sharded parameters: take graphs False, or leave shard 1 out"),
        ({"compute": "timed"}, "shard 1 is of parameters, and compute 'timed' has none"),
        ({"shard": -1}, "shard must be a whole number of 0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RunConfig(**({"shard": 1, "microbatches": 4} | SMALL | options))


def test_a_file_that_gathers_and_does_not_reduce_is_refused_with_the_stage(tmp_path) -> None:
    (tmp_path / "file.csv").write_text("0UNSHARD,0F0,0B0,0REDUCE_GRAD\n1UNSHARD,1F0,1B0\n")
    config = SMALL | {"layers": 2, "from_csv": tmp_path / "file.csv"}
    with pytest.raises(InputError, match="1REDUCE_GRAD is missing: add it after the stage's last backward"):
        RunConfig(**config)
    with pytest.raises(InputError, match="tp 2 does not go with sharded parameters: take tp 1, or leave UNSHARD out"):
        RunConfig(**config, tp=2)
