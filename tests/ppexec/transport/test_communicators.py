"""Communicators of pairs and ranks, over gloo: the same bits, and messages that wait for those before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppsim import InputError, LayerCost, Schedule, attribute, save_costs
from tests.support.causality import check_causality
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

# Rank 0 posts the receive of B0 before it sends F1.
BLOCKED = """\
0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0B0,0RECV_B1,0B1
1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "interleaved-1f1b", "streams": "rank", "communication": "early"},
        {"schedule": "zb-v", "streams": "rank", "communication": "early", "ranks": 3, "layers": 6, "microbatches": 6},
        {"schedule": "dualpipe-v", "streams": "pair", "communication": "early"},
        {"schedule": "1f1b", "streams": "pair", "communication": "early", "dp": 2},
        {"schedule": "1f1b", "streams": "rank", "communication": "early", "forward_only": True},
        {"schedule": "1f1b", "communication": "early"},
        {"schedule": "interleaved-zb", "communication": "late"},
        {"schedule": "1f1b", "communication": "late", "device": "threads"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_wherever_receives_are_posted_the_bits_are_the_same(pool: WorkerPool, changes: dict[str, Any]) -> None:
    with Session(tiny(**changes), pool=pool) as session:
        report = session.verify()
        (trace,) = session.measure(1)
    assert report.passed
    assert report.outputs_bit_equal
    check_causality(trace)
    assert trace.conditions.streams == changes.get("streams", "link")


def _timed(folder: Path, text: str, **changes: Any) -> RunConfig:
    path, costs = folder / "written.csv", folder / "costs.json"
    path.write_text(text)
    layer = LayerCost(name="x", forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, output_bytes=64)
    save_costs([layer] * 2, costs)
    return RunConfig(from_csv=path, layers=2, compute="timed", costs=costs, steps=1, warmup=1, **changes)


def test_a_receive_that_stands_early_blocks_a_send_for_real(pool: WorkerPool, tmp_path: Path) -> None:
    """On one communicator F1 sets off when B0 has come; 1F1 runs after that, though 0F1 had long ended."""
    with Session(_timed(tmp_path, BLOCKED, streams="rank"), pool=pool) as session:
        (trace,) = session.measure(1)
    spelled = [str(trace.program.message_action(k, sending=True)) for k in range(len(trace.program.messages))]
    f1, b0 = spelled.index("0SEND_F1"), spelled.index("1SEND_B0")
    assert trace.message_start_s[f1] >= trace.message_arrival_s[b0]
    made_s = trace.end_s[trace.program.messages.producer]
    assert trace.message_start_s[f1] - made_s[f1] > 0.005
    assert np.isfinite(attribute(trace).bubble_s).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "1f1b", "ranks": 3, "streams": "rank"}, "would wait for ever"),
        ({"streams": "rank", "device": "cpu"}, "run over gloo on device 'threads'"),
        ({"streams": "pair", "backend": "local"}, "run over gloo on device 'threads'"),
        ({"communication": "early", "receive_window": 2}, "receive_window 2 is of receives posted ahead"),
    ],
)
def test_what_cannot_be_is_refused_before_a_process_starts(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny(**changes)
    assert said in str(caught.value)


def test_what_is_written_is_run(tmp_path: Path) -> None:
    config = _timed(tmp_path, BLOCKED)
    assert config.pipeline.communication == Schedule.from_csv(BLOCKED).communication
    assert config.pipeline.forward_only().to_csv(messages=True).splitlines()[0] == "0F0,0SEND_F0,0F1,0SEND_F1"
    assert ppexec.RunConfig(schedule="1f1b").pipeline == ppsim.build_schedule("1f1b", ranks=2, microbatches=8)
