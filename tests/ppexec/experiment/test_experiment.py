"""Predicted and measured, where microbatches of one step differ."""

from __future__ import annotations

import pytest

import ppexec
from ppexec.workers.pool import WorkerPool
from tests.support.remote import tiny


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_microbatches_that_differ_are_predicted_one_by_one(pool: WorkerPool, schedule: str) -> None:
    """All microbatches were predicted with the bytes of the one that was profiled first."""
    config = tiny(
        schedule=schedule, layers=8, global_batch_size=10, microbatches=4, micro_batch_size=0, steps=3, warmup=1
    )
    outcome = ppexec.predict_and_measure(config, pool=pool, verify=False)
    assert outcome.summary()["memory"]["equal_at_every_action"]
    for measured in outcome.measured:  # every step reads microbatches in the order that was predicted
        assert measured.message_bytes.tolist() == outcome.predicted.message_bytes.tolist()
    assert sorted({cost.output_bytes for cost in outcome.stages[0]}) == [2 * 2 * 8 * 4, 3 * 2 * 8 * 4]
    assert outcome.largest_stages[0].output_bytes == 3 * 2 * 8 * 4
