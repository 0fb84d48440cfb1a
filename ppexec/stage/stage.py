"""Stage: a run of consecutive layers, with the microbatches whose backward is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ppexec.models.batch import Batch
from ppexec.models.dropout import Randomness
from ppexec.models.model import Loss
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger
from ppexec.stage.split_backward import SplitBackward, Unit, add_weight_gradients
from ppexec.stage.tensor_parallel import local, local_gradient
from ppexec.stage.timed import TimedStage
from ppsim import Kind


class _Held(NamedTuple):
    """What the runtime keeps of a microbatch until its backward: input, output, and where the backward starts."""

    inputs: torch.Tensor
    output: torch.Tensor
    root: torch.Tensor


class Stage:
    """Runs F, B, I and W of its layers, one microbatch at a time.

    index: stage number. layers: its modules, real. loss: None unless it is the last stage. microbatches: of the step
    over all replicas; each one's loss counts 1 / microbatches, so that the step's loss is their mean. trains: False for
    an evaluation, which keeps nothing. copies_input: True where a layer works in place on the stage's input, which
    autograd forbids and which the stage before may still need. randomness: what its layers' dropout asks where it is;
    None without dropout. ledger: where it writes what it holds; None counts nothing.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Module],
        *,
        first_layer: int,
        loss: Loss | None,
        microbatches: int,
        trains: bool,
        copies_input: bool = False,
        randomness: Randomness | None = None,
    ) -> None:
        self.index = index
        self.copies_input = copies_input
        self.layers = list(layers)
        self.first_layer = first_layer
        self.loss = loss
        self.microbatches = microbatches
        self.trains = trains
        self.randomness = randomness
        self.ledger: Ledger | None = None
        self._batch = Batch()
        self._held: dict[int, _Held] = {}
        self._units: dict[int, list[Unit]] = {}
        self._share: torch.Tensor | None = None
        self.losses: dict[int, torch.Tensor] = {}

    @property
    def is_first(self) -> bool:
        """Whether it takes data instead of another stage's output."""
        return self.index == 0

    @cached_property
    def _split(self) -> SplitBackward:
        """Made when first needed: its hooks cost every forward a little."""
        return SplitBackward(self.layers)

    def begin(self, batch: Batch) -> None:
        """What comes next is of this batch."""
        self._batch = batch

    def _announce(self, microbatch: int) -> None:
        """Tell the layers' dropout what they compute next."""
        if self.randomness is not None:
            self.randomness.at(self._batch.step, self._batch.samples[microbatch])

    def forward(
        self, microbatch: int, inputs: torch.Tensor | None, target: torch.Tensor | None, *, split: bool = False
    ) -> torch.Tensor:
        """F: the output for this microbatch, detached and dense, as messages are; the last stage computes its loss too.

        split: whether its backward will come as I and W instead of B.
        """
        if inputs is None:
            raise ValueError(f"stage {self.index} has no input for microbatch {microbatch}")
        if not self.trains:
            with torch.no_grad():
                output = self._chain(inputs)
                if self.loss is not None and target is not None:
                    self.losses[microbatch] = self.loss(output, target)
            return output.contiguous()
        self._announce(microbatch)
        if not self.is_first and inputs.is_floating_point():
            inputs.requires_grad_()
        cutting: AbstractContextManager[list[Unit]] = self._split.recording(self.ledger) if split else nullcontext([])
        with self.ledger.saving() if self.ledger else nullcontext(), cutting as units:
            output = root = self._chain(inputs)
            if self.loss is not None and target is not None:
                root = self.loss(output, target)
                self.losses[microbatch] = root.detach()
        # The runtime holds input and output until the backward ends, whether or not autograd saved them.
        self._held[microbatch] = _Held(inputs, output, root)
        self._units[microbatch] = units
        if self.ledger:
            self.ledger.hold(inputs)
            self.ledger.hold(output)
        return output.detach().contiguous()

    def _chain(self, value: torch.Tensor) -> torch.Tensor:
        if self.copies_input:
            value = value.clone()
        for layer in self.layers:
            value = layer(value)
        return value

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """B: adds to the parameters' gradients; the gradient for the input, None on the first stage.

        gradient: that of the output, None on the last stage.
        """
        del self._units[microbatch]
        return self._backward(microbatch, gradient)

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """I: as B, but leaves the parameters' gradients, and what they need, to `backward_weight`."""
        return self._backward(microbatch, gradient)

    def backward_weight(self, microbatch: int) -> None:
        """W: adds to the parameters' gradients."""
        add_weight_gradients(self._units.pop(microbatch))

    def _backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        inputs, output, root = self._held.pop(microbatch)
        if root.requires_grad:
            torch.autograd.backward(root, self._loss_share(root) if gradient is None else gradient)
        input_gradient = None
        if not self.is_first:
            # An output that does not depend on its input, or an input that has no gradient, sends zeros.
            input_gradient = inputs.grad if inputs.grad is not None else torch.zeros_like(inputs)
            inputs.grad = None
        if self.ledger:
            del root
            self.ledger.drop(inputs)
            self.ledger.drop(output)
        return input_gradient

    def _loss_share(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of a microbatch's loss, 1 / microbatches. Made once: to divide each loss takes three kernels.

        Raises ValueError for a loss that is not one number.
        """
        if loss.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(loss.shape)}: give one number, such as its mean")
        share = self._share
        if share is None or (share.shape, share.dtype) != (loss.shape, loss.dtype):
            share = self._share = torch.full_like(loss, 1.0) / self.microbatches
        return share

    def reduce_gradients(self, group: dist.ProcessGroup) -> Reduction:
        """Start adding up the gradients of all replicas, each rank of tp its own slices."""
        gradients = []
        for layer in self.layers:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:  # every replica must take part
                        parameter.grad = torch.zeros_like(parameter)
                    gradient = local_gradient(parameter)
                    if gradient is not None:
                        gradients.append(gradient)
        return Reduction(gradients, group)

    def blank_gradients(self) -> list[torch.Tensor]:
        """Zeros in place of this rank's part of each gradient that `reduce_gradients` adds up."""
        parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        return [torch.zeros_like(local(p)) for p in parameters if p.requires_grad]

    def part(self, begin: int, end: int, *, copies_input: bool) -> Stage:
        """Some of its layers as a stage of their own, with the data and loss that are theirs; nothing under way."""
        part = type(self)(
            self.index if begin == 0 else -1,
            self.layers[begin:end],
            first_layer=self.first_layer + begin,
            loss=self.loss if end == len(self.layers) else None,
            microbatches=self.microbatches,
            trains=self.trains,
            copies_input=copies_input,
            randomness=self.randomness,
        )
        part.begin(self._batch)
        return part

    def close(self) -> None:
        """Leave its layers as they were before it ran."""
        self.clear()
        if "_split" in vars(self):
            self._split.close()
            del self._split

    def clear(self) -> None:
        """Forget gradients, losses and microbatches under way."""
        if self.randomness is not None:
            self.randomness.off()
        self._held.clear()
        self._units.clear()
        self.losses.clear()
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)


def act(
    stage: Stage | TimedStage, kind: Kind, microbatch: int, value: torch.Tensor | None, batch: Batch, *, split: bool
) -> torch.Tensor | None:
    """Do one action of a stage; its output, if it has one.

    value: the input of F, or the gradient of the output for B and I. split: whether an F's backward comes as I and W.
    """
    if kind == Kind.F:
        target = batch.targets[microbatch] if stage.loss is not None else None
        return stage.forward(microbatch, value, target, split=split)
    if kind == Kind.B:
        return stage.backward(microbatch, value)
    if kind == Kind.I:
        return stage.backward_input(microbatch, value)
    stage.backward_weight(microbatch)
    return None
