"""Stage: consecutive layers, and the microbatches whose backward is still to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from ppexec.models.batch import Batch, fitted
from ppexec.models.dropout import Randomness
from ppexec.models.model import Loss
from ppexec.models.model_error import reraise
from ppexec.models.reduction import Share
from ppexec.models.shapes import Tree, differentiable, pack, tensors_in
from ppexec.stage.draws import LOSS, Draws
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger, gradient_bytes, tensors_of
from ppexec.stage.message import gradients_of, message_of, versions
from ppexec.stage.offloaded import HostBuffer, Offloadable
from ppexec.stage.sharded import ShardedParameters
from ppexec.stage.split_backward import SplitBackward, Unit, add_weight_gradients
from ppexec.stage.tensor_parallel import local, local_gradient
from ppsim.errors import InputError

_NOTHING = nullcontext()  # made once: every forward enters one
_MOST_SHARES = 64  # kept, where they change from step to step


class _Held(NamedTuple):
    """What is kept of a microbatch until its backward, which starts at the loss, or at the outputs without one."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    loss: torch.Tensor | None


class _HeldUntilAgain(NamedTuple):
    """What is kept of a microbatch from its F to its R; the input as it came, and its tensors and the output's."""

    inputs: Tree
    target: Tree | None
    tensors: list[torch.Tensor]


class Stage:
    """Computes F, R, B, I and W of its layers, one microbatch at a time.

    Parameters
    ----------
    index : int
        Stage number.
    layers : sequence of Module
        Its modules, real.
    first_layer : int
        Position of the first of them in the model's chain.
    loss : callable or None
        The model's on the last stage, None on others.
    microbatches : int
        Of a round over all replicas. Each loss counts 1 / (microbatches rounds), so the step's loss is their mean.
    trains : bool
        False for an evaluation, which keeps nothing.
    copies_input : bool
        Whether a layer works in place on the stage's input. Autograd forbids that, and the stage before may still need
        the tensor, so a copy is computed with.
    randomness : Randomness, optional
        The model's, if it has dropout.
    draws : Draws, optional
        Keys what layers draw from PyTorch's generators. Without it they draw as they come.
    counts_terms : bool
        Whether the loss gives a sum and the number of its terms.
    replicated : bool
        Whether others, in replicas or as copies of the model, have the same stage. Then every trained parameter has a
        gradient after the first backward, of zeros if it takes no part in the loss, so that all add up the same.
    sharded : ShardedParameters, optional
        Its parameters, if each replica holds a share of them.
    is_first : bool, optional
        Whether its input is data instead of another stage's output. By default that of stage 0 is.

    Attributes
    ----------
    ledger : Ledger or None
        Counts what the stage holds. None counts nothing.
    losses : dict of int to Tensor
        On the last stage, the loss of each microbatch.
    terms : dict of int to float or Tensor
        The number of terms of each loss, where the loss counts them.
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
        draws: Draws | None = None,
        counts_terms: bool = False,
        replicated: bool = False,
        sharded: ShardedParameters | None = None,
        is_first: bool | None = None,
    ) -> None:
        self.index = index
        self.is_first = index == 0 if is_first is None else is_first
        self.copies_input = copies_input
        self.layers = list(layers)
        self.first_layer = first_layer
        self.loss = loss
        self.microbatches = microbatches
        self.trains = trains
        self.randomness = randomness
        self.draws = draws
        self.counts_terms = counts_terms
        self.replicated = replicated
        self.sharded = sharded
        self._has_all_gradients = not replicated
        self.ledger: Ledger | None = None
        self._batch = Batch()
        self._held: dict[int, _Held] = {}
        self._held_until_again: dict[int, _HeldUntilAgain] = {}
        self._offloadable: dict[int, Offloadable] = {}
        self._units: dict[int, list[Unit]] = {}
        self._gradients: dict[tuple[Share, torch.Size, torch.dtype], torch.Tensor] = {}
        self.losses: dict[int, torch.Tensor] = {}
        self.terms: dict[int, float | torch.Tensor] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, each once."""
        return [parameter for parameter in nn.ModuleList(self.layers).parameters() if parameter.requires_grad]

    @cached_property
    def _split(self) -> SplitBackward:
        """Made when it is first needed, since its hooks slow every forward down."""
        return SplitBackward(self.layers)

    def begin(self, batch: Batch) -> None:
        """Start a step with this batch, or a round of one."""
        self._batch = batch

    def _announce(self, microbatch: int) -> None:
        """Say which microbatch is computed next, for what layers draw."""
        if not self._batch.samples:
            return
        if self.randomness is not None and self.trains:
            self.randomness.at(self._batch.step, self._batch.samples[microbatch])
        if self.draws is not None:
            self.draws.at(self._batch.step, self._batch.samples[microbatch])

    def forward(
        self,
        microbatch: int,
        inputs: Tree | None,
        target: Tree | None,
        *,
        split: bool = False,
        again: bool = False,
        moves: bool = False,
    ) -> torch.Tensor:
        """Compute F, and on the last stage the loss.

        Parameters
        ----------
        microbatch : int
            Its number in the step.
        inputs : Tensor or pytree of tensors
            Data, or the message of the stage before.
        target : Tensor, pytree of tensors or None
            On the last stage.
        split : bool
            Whether its backward will be I and W instead of B.
        again : bool
            Whether R will compute it once more. Then input and output alone are kept.
        moves : bool
            Whether O will move what is kept to host memory.

        Returns
        -------
        Tensor
            The message: the output, detached and contiguous, packed if it has several tensors.

        Raises
        ------
        InputError
            If a layer changes the stage's input, which R needs.
        """
        offloadable = None
        if moves:
            older = [*tensors_of(self.layers), *tensors_in(target)]
            self._offloadable[microbatch] = offloadable = Offloadable(older, self.ledger)
        if again and self.trains and inputs is not None:
            return self._forward_without_graph(microbatch, inputs, target)
        value = self._entered(microbatch, inputs)
        self._announce(microbatch)
        if not self.trains:
            with torch.no_grad():
                output = self._chain(value)
                if self.loss is not None and target is not None:
                    self.losses[microbatch] = fitted(self._loss_of(microbatch, output, target))
            return message_of(output)
        entering = tensors_in(value)
        if not self.is_first:
            for tensor in differentiable(entering):
                tensor.requires_grad_()
        cutting: AbstractContextManager[list[Unit] | None] = self._split.recording(self.ledger) if split else _NOTHING
        loss = None
        saving = offloadable or self.ledger
        with saving.saving() if saving else _NOTHING, cutting as units:
            output = self._chain(value)
            if self.loss is not None and target is not None:
                loss = self._loss_of(microbatch, output, target)
                self.losses[microbatch] = kept = fitted(loss.detach())
                if type(loss) is torch.Tensor:
                    loss.data = kept  # mse_loss leaves its mean in memory as large as the output; the graph needs none
        # The runtime holds input and output until the backward ends, whether or not autograd saved them.
        self._held[microbatch] = held = _Held(entering, tensors_in(output), loss)
        self._units[microbatch] = units or []
        if self.ledger:
            for tensor in (*held.inputs, *held.outputs):
                self.ledger.hold(tensor)
        return message_of(output)

    def _forward_without_graph(self, microbatch: int, inputs: Tree, target: Tree | None) -> torch.Tensor:
        value = self._entered(microbatch, inputs)
        before = versions(value)
        self._announce(microbatch)
        with torch.no_grad():
            output = self._chain(value)
            if self.loss is not None and target is not None:
                self.losses[microbatch] = fitted(self._loss_of(microbatch, output, target))
        if versions(value) != before:
            raise InputError(
                f"stage {self.index} changes its input in place, so {self.index}R{microbatch} cannot compute it once "
                "more: take its layers without inplace=True, or leave R out"
            )
        tensors = [*tensors_in(value), *tensors_in(output)]
        self._held_until_again[microbatch] = _HeldUntilAgain(inputs, target, tensors)
        if self.ledger:
            for tensor in tensors:
                self.ledger.hold(tensor)
        return message_of(output)

    def recompute(self, microbatch: int, *, split: bool = False) -> None:
        """Compute R: F once more, with what its backward needs. Nothing is sent, and the loss is the same."""
        held = self._held_until_again.pop(microbatch)
        if self.ledger:
            for tensor in held.tensors:
                self.ledger.drop(tensor)
        inputs, target = held.inputs, held.target
        del held  # the output of F goes before another is made
        self.forward(microbatch, inputs, target, split=split)

    def offload(self, microbatch: int, host_buffer: HostBuffer, uses: Callable[[torch.Tensor], None]) -> int:
        """Compute O: what the microbatch keeps goes to host memory. Gives the bytes; see `Offloadable.leave`."""
        offloadable = self._offloadable[microbatch]
        if microbatch in self._held_until_again:
            waiting = self._held_until_again[microbatch]
            offloadable.keep(waiting.tensors, tensors_in(waiting.inputs))
        else:
            held = self._held[microbatch]
            # Units of a split backward have the inputs of their layers as tensors of their own.
            inner = [tensor for unit in self._units[microbatch] for tensor in unit.inner_inputs]
            offloadable.keep([*held.inputs, *held.outputs], inner)
        return offloadable.leave(host_buffer, uses)

    def load(self, microbatch: int, uses: Callable[[torch.Tensor], None]) -> int:
        """Compute L: it comes back. Gives the bytes; see `Offloadable.come_back`."""
        return self._offloadable.pop(microbatch).come_back(uses)

    def _entered(self, microbatch: int, inputs: Tree | None) -> Tree:
        """What the first layer takes. Raises InputError if there is nothing."""
        if inputs is None:
            raise RuntimeError(f"stage {self.index} has no input for microbatch {microbatch}: give its data or message")
        if self.is_first or not self._batch.boundaries:
            return inputs
        return self._batch.boundaries[microbatch][self.first_layer].unpack(inputs)

    def _chain(self, value: Tree) -> Tree:
        for position in range(len(self.layers)):
            value = self._layer(position, value)
        return value

    def _layer(self, position: int, value: Tree) -> Tree:
        """A layer's output."""
        if self.copies_input and position == 0:
            value = pytree.tree_map_only(torch.Tensor, torch.clone, value)
        layer, number = self.layers[position], self.first_layer + position
        try:
            return layer(value) if self.draws is None else self.draws.call(number, layer, value)
        except Exception as error:
            reraise(error, f"layer {number} ({type(layer).__name__})")

    def _loss_of(self, microbatch: int, output: Tree, target: Tree) -> torch.Tensor:
        """The loss of a microbatch. Raises InputError if it is not one number, or lacks the number of its terms."""
        if self.loss is None:
            raise RuntimeError(f"stage {self.index} computes a loss and was given no function for it")
        try:
            loss = self.loss(output, target) if self.draws is None else self.draws.call(LOSS, self.loss, output, target)
        except Exception as error:
            reraise(error, "the loss")
        if self.counts_terms:
            if not isinstance(loss, tuple) or len(loss) != 2:
                raise InputError(f"the loss is {type(loss).__name__}: with reduction='sum' give (sum, number of terms)")
            loss, self.terms[microbatch] = loss
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise InputError(f"the loss is {what}: give a tensor of one number, such as the mean")
        return loss

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute B, which adds to the parameters' gradients.

        Parameters
        ----------
        microbatch : int
            Its number in the step.
        gradient : Tensor or None
            Gradient of the output; None on the last stage.

        Returns
        -------
        Tensor or None
            Gradient of the input; None on the first stage.
        """
        del self._units[microbatch]
        input_gradient = self._backward(microbatch, gradient)
        self._complete_gradients()
        return input_gradient

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute I: as B, but without the parameters' gradients. What these need is kept for `backward_weight`."""
        return self._backward(microbatch, gradient)

    def backward_weight(self, microbatch: int) -> None:
        """Compute W, which adds to the parameters' gradients."""
        try:
            add_weight_gradients(self._units.pop(microbatch))
        except Exception as error:
            reraise(error, f"the weights' backward of stage {self.index}")
        self._complete_gradients()

    def _complete_gradients(self) -> None:
        """Give zeros to each parameter that has no gradient after the first backward, where there are replicas."""
        if self._has_all_gradients:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._has_all_gradients = True

    def _backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        inputs, outputs, loss = self._held.pop(microbatch)
        roots = [loss] if loss is not None else differentiable(outputs)
        gradients = [self._loss_gradient(microbatch, loss)] if loss is not None else gradients_of(roots, gradient)
        reached = [(root, given) for root, given in zip(roots, gradients, strict=True) if root.requires_grad]
        if reached:
            try:
                torch.autograd.backward([root for root, _ in reached], [given for _, given in reached])
            except Exception as error:
                reraise(error, f"the backward of stage {self.index}")
        input_gradient = None
        if not self.is_first:
            leaves = differentiable(inputs)
            # The stage before waits for a gradient even if the output does not depend on the input.
            each = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
            input_gradient = pack(each, inputs[0].device)
            for leaf in leaves:
                leaf.grad = None
        if self.ledger:
            for tensor in (*inputs, *outputs):
                self.ledger.drop(tensor)
        return input_gradient

    def drawing_layers(self) -> list[str]:
        """What draws random numbers in a step, as the forwards so far have shown."""
        found = ["the model's dropout"] if self.randomness is not None and self.trains else []
        if self.draws is not None:
            numbers = range(self.first_layer, self.first_layer + len(self.layers))
            found += [f"layer {number}" for number in numbers if not self.draws.is_quiet(number)]
            found += ["the loss"] if self.loss is not None and not self.draws.is_quiet(LOSS) else []
        return found

    def share_of(self, microbatch: int) -> Share:
        """What a microbatch's loss counts in that of its step."""
        batch = self._batch
        return Share(*batch.shares[microbatch]) if batch.shares else Share(1.0, self.microbatches * batch.rounds)

    def _loss_gradient(self, microbatch: int, loss: torch.Tensor) -> torch.Tensor:
        """The gradient with which a microbatch's backward starts. Kept: to make it takes two kernels."""
        share = self.share_of(microbatch)
        key = (share, loss.shape, loss.dtype)
        if key not in self._gradients:
            if len(self._gradients) > _MOST_SHARES:
                self._gradients.clear()
            self._gradients[key] = share.gradient(loss)
        return self._gradients[key]

    def reduce_gradients(self, group: dist.ProcessGroup) -> Reduction:
        """Start to add up the gradients of all replicas, each rank of tp its own slices."""
        gradients = [local_gradient(parameter) for parameter in self.parameters]
        return Reduction([gradient for gradient in gradients if gradient is not None], group)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that its parameters have now."""
        return gradient_bytes(self.layers) if self.sharded is None else self.sharded.gradient_bytes

    def blank_gradients(self) -> list[torch.Tensor]:
        """Zeros of the shape of each gradient that `reduce_gradients` adds up, on this rank."""
        return [torch.zeros_like(local(parameter)) for parameter in self.parameters]

    def part(self, begin: int, end: int, *, copies_input: bool) -> Stage:
        """A new stage of the layers from `begin` to `end` - 1, with their data and loss."""
        part = type(self)(
            self.index if begin == 0 else -1,
            self.layers[begin:end],
            first_layer=self.first_layer + begin,
            loss=self.loss if end == len(self.layers) else None,
            microbatches=self.microbatches,
            trains=self.trains,
            copies_input=copies_input,
            randomness=self.randomness,
            draws=self.draws,
            counts_terms=self.counts_terms,
            replicated=self.replicated,
            is_first=self.is_first and begin == 0,
        )
        part.begin(self._batch)
        return part

    def close(self) -> None:
        """Remove its hooks from the layers, and forget all."""
        self.clear()
        if "_split" in vars(self):
            self._split.close()
            del self._split

    def clear(self) -> None:
        """Forget gradients, losses and all microbatches."""
        if self.randomness is not None:
            self.randomness.off()
        if self.draws is not None:
            self.draws.off()
        self._held.clear()
        self._held_until_again.clear()
        self._offloadable.clear()
        self._units.clear()
        self.losses.clear()
        self.terms.clear()
        self._has_all_gradients = not self.replicated
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)
        if self.sharded is not None:
            self.sharded.clear()
