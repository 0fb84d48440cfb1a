"""Timed stage: takes a stage's time and sends its messages without computing anything."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ppexec.machine.clock import now_ns
from ppexec.models.batch import Batch
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger
from ppsim import StageCost

_PR_SET_TIMERSLACK = 29
_AWAKE_NS = 150_000


class TimedStage:
    """Stands in for a Stage: every action waits, all but asleep, until its stated time has passed.

    Messages are real, of `output_bytes` each. Activations are not allocated; the ledger is told the stated bytes, so
    that it follows the runtime's own order. So the bubbles of more ranks than there are cores can be measured.

    index: stage number. cost: of this stage. before: of the stage before, whose output is this one's input; None on the
    first. is_last: the last stage sends nothing on. trains: False for an evaluation. spend: takes an action's seconds.
    """

    def __init__(
        self,
        index: int,
        cost: StageCost,
        *,
        before: StageCost | None,
        is_last: bool,
        trains: bool,
        spend: Callable[[float], None],
    ) -> None:
        self._spend_s = spend
        self.index = index
        self.loss = None
        self.trains = trains
        self.ledger: Ledger | None = None
        self._cost = cost
        self._output = None if is_last else torch.zeros(cost.output_bytes, dtype=torch.uint8)
        self._gradients: list[torch.Tensor] | None = None  # of the parameters, made when replicas add them up
        self._gradient = None if before is None else torch.zeros(before.output_bytes, dtype=torch.uint8)

    @property
    def is_first(self) -> bool:
        """Whether it takes no other stage's output."""
        return self.index == 0

    def begin(self, batch: Batch) -> None:
        """No data is looked at."""

    def forward(
        self, microbatch: int, inputs: torch.Tensor | None, target: torch.Tensor | None, *, split: bool = False
    ) -> torch.Tensor | None:
        """Wait for F; a message of the output's size."""
        if self.ledger and self.trains:
            self.ledger.add(self._cost.activation_bytes)
        self._spend_s(self._cost.forward_s)
        return self._output

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Wait for B; a message of the input's size."""
        self._spend_s(self._cost.full_backward_s)
        if self.ledger:
            self.ledger.add(-self._cost.activation_bytes)
        return self._gradient

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Wait for I; a message of the input's size."""
        self._spend_s(self._cost.backward_input_s)
        if self.ledger:
            self.ledger.add(self._cost.weight_activation_bytes - self._cost.activation_bytes)
        return self._gradient

    def backward_weight(self, microbatch: int) -> None:
        """Wait for W."""
        self._spend_s(self._cost.backward_weight_s)
        if self.ledger:
            self.ledger.add(-self._cost.weight_activation_bytes)

    def reduce_gradients(self, group: dist.ProcessGroup) -> Reduction:
        """As many bytes as the trained parameters have, added up for real."""
        if self._gradients is None:
            self._gradients = self.blank_gradients()
        return Reduction(self._gradients, group)

    def blank_gradients(self) -> list[torch.Tensor]:
        """One tensor of zeros as large as all gradients, down to whole floats; none if there are none."""
        count = self._cost.trained_bytes // 4
        return [torch.zeros(count)] if count else []

    def clear(self) -> None:
        """Nothing is kept from one step to the next."""


def wait_s(seconds: float) -> None:
    """Wait for this long: asleep but for the end, since sleeping itself ends about a tenth of a millisecond late."""
    until = now_ns() + round(seconds * 1e9)
    while (left := until - now_ns()) > _AWAKE_NS:
        time.sleep((left - _AWAKE_NS) / 1e9)
    while now_ns() < until:
        os.sched_yield()  # whoever has work goes first


def burn_s(seconds: float) -> None:
    """Keep a core at work for this long, by the CPU time of this thread: who waits for a core does not advance."""
    until = time.thread_time_ns() + round(seconds * 1e9)
    while time.thread_time_ns() < until:
        pass


def sharpen_sleep() -> None:
    """Ask Linux to end this thread's sleeps on time, not up to 50 us later to save wake-ups."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
