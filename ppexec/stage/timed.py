"""Timed stage: takes a stage's time and sends its messages without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ppexec.machine.device import Device
from ppexec.machine.waiting import burn_s
from ppexec.models.batch import Batch
from ppexec.models.shapes import TensorSpec
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger
from ppexec.stage.offloaded import HostBuffer
from ppsim import Program, StageCost
from ppsim.checks import check_memory
from ppsim.errors import InputError
from ppsim.simulation.timed_program import message_bytes

_MOST_S = 1e6  # eleven days


class TimedStage:
    """Takes the place of a Stage: each action waits until its stated time has passed.

    Messages are real, of the bytes that the costs state. Activations are not allocated; the ledger is told their
    stated bytes. So the bubbles of more ranks than there are cores can be measured.

    Parameters
    ----------
    index : int
        Stage number.
    cost : StageCost
        Of this stage.
    before : StageCost or None
        Of the stage before, whose output is this one's input; None on the first stage.
    is_last : bool
        The last stage sends no output.
    trains : bool
        False for an evaluation.
    spend : callable
        Takes the seconds of an action, and as long.
    device : torch.device
        Where its messages are.

    Attributes
    ----------
    is_first : bool
        Whether no other stage sends it inputs.
    ledger : Ledger or None
        Is told what the stage holds.

    Raises
    ------
    InputError
        For an action that nobody would wait for, or messages that memory does not hold.
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
        device: torch.device,
    ) -> None:
        longest_s = max(
            cost.forward_s, cost.full_backward_s, cost.backward_input_s, cost.backward_weight_s, cost.again_s
        )
        if longest_s > _MOST_S:
            raise InputError(
                f"stage {index} has an action of {longest_s:g} s, which a timed run waits for: give costs of at most "
                f"{_MOST_S:g} s"
            )
        held_bytes = cost.output_bytes + (0 if before is None else before.backward_message_bytes)
        check_memory(f"messages of stage {index}", held_bytes, "give fewer output_bytes")
        self._spend_s = spend
        self._device = device
        self.index = index
        self.is_first = before is None
        self.loss = None
        self.trains = trains
        self.ledger: Ledger | None = None
        self._cost = cost
        self._moved_bytes: dict[int, int] = {}
        self._output = None if is_last else torch.zeros(cost.output_bytes, dtype=torch.uint8, device=device)
        self._gradients: list[torch.Tensor] | None = None  # of the parameters, made when they are first added up
        self._gradient = (
            None if before is None else torch.zeros(before.backward_message_bytes, dtype=torch.uint8, device=device)
        )

    def begin(self, batch: Batch) -> None:
        """Do nothing: no data is needed."""

    def forward(
        self,
        microbatch: int,
        inputs: torch.Tensor | None,
        target: torch.Tensor | None,
        *,
        split: bool = False,
        again: bool = False,
        moves: bool = False,
    ) -> torch.Tensor | None:
        """Wait for the time of F, and give a message of the output's size."""
        if moves:
            self._moved_bytes[microbatch] = self._cost.kept_bytes if again else self._cost.moved_bytes
        if self.ledger and self.trains:
            self.ledger.add(self._cost.kept_bytes if again else self._cost.activation_bytes)
        self._spend_s(self._cost.forward_s)
        return self._output

    def recompute(self, microbatch: int, *, split: bool = False) -> None:
        """Wait for the time of R."""
        if self.ledger:
            self.ledger.add(self._cost.activation_bytes - self._cost.kept_bytes)
        self._spend_s(self._cost.again_s)

    def offload(self, microbatch: int, host_buffer: HostBuffer, uses: Callable[[torch.Tensor], None]) -> int:
        """Let the bytes of O go. It takes no time."""
        if self.ledger:
            self.ledger.add(-self._moved_bytes[microbatch])
        return self._moved_bytes[microbatch]

    def load(self, microbatch: int, uses: Callable[[torch.Tensor], None]) -> int:
        """Take the bytes of L. It takes no time."""
        if self.ledger:
            self.ledger.add(self._moved_bytes[microbatch])
        return self._moved_bytes[microbatch]

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Wait for the time of B, and give a message of the input's size."""
        self._spend_s(self._cost.full_backward_s)
        if self.ledger:
            self.ledger.add(-self._cost.activation_bytes)
        return self._gradient

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Wait for the time of I, and give a message of the input's size."""
        self._spend_s(self._cost.backward_input_s)
        if self.ledger:
            self.ledger.add(self._cost.weight_activation_bytes - self._cost.activation_bytes)
        return self._gradient

    def backward_weight(self, microbatch: int) -> None:
        """Wait for the time of W."""
        self._spend_s(self._cost.backward_weight_s)
        if self.ledger:
            self.ledger.add(-self._cost.weight_activation_bytes)

    def reduce_gradients(self, group: dist.ProcessGroup) -> Reduction:
        """Start to add up as many bytes as the trained parameters have."""
        if self._gradients is None:
            self._gradients = self.blank_gradients()
        return Reduction(self._gradients, group)

    def blank_gradients(self) -> list[torch.Tensor]:
        """One tensor of zeros as large as all gradients, rounded down to whole floats; empty without gradients."""
        count = self._cost.trained_bytes // 4
        return [torch.zeros(count, device=self._device)] if count else []

    def clear(self) -> None:
        """Do nothing: nothing is kept from one step to the next."""


def timed_stages(
    held: Sequence[int],
    costs: Sequence[StageCost],
    *,
    trains: bool,
    device: Device,
    busy: bool = False,
    copies: int = 1,
) -> dict[int, TimedStage]:
    """The timed stages of one rank.

    Parameters
    ----------
    held : sequence of int
        Its stages.
    costs : sequence of StageCost
        Of all stages.
    trains : bool
        False for an evaluation.
    device : Device
        Which waits.
    busy : bool
        Keep a core busy during each action, instead of waiting.
    copies : int
        Copies of the model that the stages are of.
    """
    size = len(costs) // copies
    return {
        stage: TimedStage(
            stage,
            costs[stage],
            before=costs[stage - 1] if stage % size else None,
            is_last=(stage + 1) % size == 0,
            trains=trains,
            spend=burn_s if busy else device.wait_s,
            device=device.torch_device,
        )
        for stage in held
    }


def message_specs(program: Program, costs: Sequence[StageCost]) -> list[TensorSpec]:
    """The spec of each message between timed stages: as many bytes as their costs state."""
    return [TensorSpec(shape=(size,), dtype=torch.uint8) for size in message_bytes(program, costs).tolist()]
