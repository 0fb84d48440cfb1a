"""Waits: whoever waits too long says who waits for whom."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from ppexec import Model, RunConfig, Session, WorkerError, WorkerPool
from ppexec.machine.threaded import ThreadedDevice
from ppexec.models.batch import Batch
from ppexec.models.shapes import TensorSpec
from ppexec.stage.timed import timed_stages
from ppexec.transport.streams import StreamTransport
from ppexec.workers.rank import Rank, run_step
from ppexec.workers.runtime import Runtime
from ppexec.workers.watch import Watch
from ppsim import StageCost, build_schedule
from tests.support.remote import tiny

HERE = "tests.ppexec.transport.test_waits"


class Stalls(nn.Linear):
    """Takes much longer than the time-out in its third forward; on streams it is warmed up with two."""

    forwards = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.forwards += 0 if inputs.is_meta else int(inputs.any())
        if self.forwards == 3:
            time.sleep(8)
        return super().forward(inputs)


def stalling(config: RunConfig) -> Model:
    width = config.hidden
    return Model(
        layers=[Stalls(width, width), *[nn.Linear(width, width) for _ in range(config.layers - 1)]],
        sample=lambda index: (torch.ones(1, width), torch.zeros(1, width)),
        loss=nn.functional.mse_loss,
    )


@pytest.mark.parametrize(
    ("how", "waits"),
    [
        ({}, "rank 1, at action 1F2, waits for message 2 of rank 0 after its action 0F2"),
        ({"receive_window": 1}, "rank 1, at action 1F2, waits for message 2 of rank 0 after its action 0F2"),
        # All receives were posted at once, and time out at once, on whichever rank first.
        (
            {"device": "threads"},
            r"rank \d, at action (1F0|0B0), waits for message \d of rank \d after its action (0F0|1B0)",
        ),
    ],
    ids=["shared memory", "gloo", "threads and gloo"],
)
def test_a_time_out_names_who_waits_for_whom(
    pool: WorkerPool, how: dict[str, Any], waits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun, where no process watches the others."""
    monkeypatch.setattr(Watch, "has_stalled", lambda self: False)
    config = tiny(schedule="afab", model=f"{HERE}:stalling", timeout_s=0.1, **how)
    assert config.longest_wait_s == 2
    with Session(config, pool=pool) as session, pytest.raises(WorkerError, match=f"{waits}: .*imed out"):
        session.measure(1)


class Silent:
    """A link over which nothing comes, as a kernel of NCCL that waits for its message."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def send(self, tensor: torch.Tensor, message: int) -> None:
        """Gone at once."""

    def receive(self, tensor: torch.Tensor, message: int) -> None:
        """Nothing comes before the test is over."""
        self.over.wait()


def test_a_device_that_waits_for_ever_is_an_error_of_the_host() -> None:
    """NCCL has no time-out in which the host could say this, so the host has its own."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=2)
    program, link, device = schedule.program, Silent(), ThreadedDevice(timeout_s=0.3)
    compute = device.compute_stream()
    stage = StageCost(forward_s=1e-4, backward_input_s=1e-4, backward_weight_s=1e-4, output_bytes=8)
    stages = timed_stages([1], [stage] * 2, trains=True, device=device)
    transport = StreamTransport(
        program,
        [TensorSpec(shape=(2,), dtype=torch.float32)] * len(program.messages),
        rank=1,
        device=device,
        compute=compute,
        channels={(0, 1): link, (1, 0): link},
        window=1,
    )
    runtime = Runtime(program, 1, stages, transport, device=device, compute=compute)
    rank = Rank(number=1, stages=stages, compute=compute, transport=transport, runtime=runtime)
    expected = (
        "rank 1, at action 1F0, waits for message 0 of rank 0 after its action 0F0; timed out: the device was not"
    )
    with pytest.raises(RuntimeError, match=expected):
        run_step(device, [rank], [(0, action) for action in range(4)], Batch())
    link.over.set()
    device.close()
