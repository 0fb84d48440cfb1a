"""Recompute: a stage that keeps its layers' inputs alone and computes each layer anew for its backward.

The second forward happens in B, or in I where the backward is split; then what the weights still need is kept until W
as it is without recomputation (see `split_backward`), so no layer is computed a third time. Every layer is one piece:
its saved tensors live while its own backward runs, between actions there are the layers' inputs and the stage's output.
Kernels and their order are those of the stage as a whole, so gradients have the same bits; dropout is keyed, so it is
the same the second time (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost").
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ppexec.stage.split_backward import Unit, add_weight_gradients
from ppexec.stage.stage import Stage


class _Kept(NamedTuple):
    """What there is of a microbatch between its F and its backward."""

    inputs: list[torch.Tensor]
    output: torch.Tensor
    target: torch.Tensor | None


class _Entry(torch.autograd.Function):
    """Where a layer begins that the same stage has another before: hands its input's gradient over as it is.

    A leaf would put it in memory in its own way, and kernels may add up otherwise where the layout is another.
    """

    @staticmethod
    def forward(ctx: Any, taken: list[torch.Tensor], anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The value; the anchor makes it differentiable."""
        ctx.taken = taken
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Ends here."""
        ctx.taken.extend(gradients)
        return None, None, None


class RecomputingStage(Stage):
    """A Stage with less memory and a longer backward; everything else is as there."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self._kept: dict[int, _Kept] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(
        self, microbatch: int, inputs: torch.Tensor | None, target: torch.Tensor | None, *, split: bool = False
    ) -> torch.Tensor:
        """F: as in Stage. Raises ValueError if a layer changes its input, from which it could not be computed anew."""
        if not self.trains or inputs is None:
            return super().forward(microbatch, inputs, target, split=split)
        self._announce(microbatch)
        kept, value = _Kept([], inputs, target), inputs
        with torch.no_grad():
            for layer in self.layers:
                kept.inputs.append(value)
                version, value = value._version, layer(self._given(len(kept.inputs) - 1, value))
                if kept.inputs[-1]._version != version:
                    raise ValueError(
                        f"{type(layer).__name__} changes its input in place, so it cannot be computed anew: take it "
                        "without inplace=True, or do not recompute"
                    )
            if self.loss is not None and target is not None:
                self.losses[microbatch] = self.loss(value, target)
        self._kept[microbatch] = kept = kept._replace(output=value)
        if self.ledger:
            for tensor in (*kept.inputs, value):
                self.ledger.hold(tensor)
        return value.contiguous()

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """B: computes each layer anew, from the last to the first, with its backward right after."""
        return self._anew(microbatch, gradient, None)

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """I: as B, keeping what W needs."""
        units: list[Unit] = []
        self._units[microbatch] = units
        return self._anew(microbatch, gradient, units)

    def backward_weight(self, microbatch: int) -> None:
        """W: adds to the parameters' gradients; computes nothing anew."""
        add_weight_gradients(self._units.pop(microbatch))

    def _anew(self, microbatch: int, gradient: torch.Tensor | None, units: list[Unit] | None) -> torch.Tensor | None:
        inputs, output, target = self._kept.pop(microbatch)
        self._announce(microbatch)
        stage_input = inputs[0]
        reached = True
        for position in reversed(range(len(self.layers))):
            value = inputs.pop()
            if reached:
                taken: list[torch.Tensor] = []
                again = value.detach()
                if value.is_floating_point() and position:
                    again = _Entry.apply(taken, self._anchor, value)
                elif value.is_floating_point() and not self.is_first:
                    again.requires_grad_()
                root = self._run(position, again, target, units)
                reached = root.requires_grad
                if reached:
                    torch.autograd.backward(root, self._loss_share(root) if gradient is None else gradient)
                del root
                gradient = next(iter(taken), None) if position else again.grad
                reached = reached and gradient is not None
            if self.ledger:
                self.ledger.drop(value)
        if self.ledger:
            self.ledger.drop(output)
        if self.is_first:
            return None
        return gradient if reached else torch.zeros_like(stage_input)

    def _given(self, position: int, value: torch.Tensor) -> torch.Tensor:
        return value.clone() if self.copies_input and position == 0 else value

    def _run(
        self, position: int, value: torch.Tensor, target: torch.Tensor | None, units: list[Unit] | None
    ) -> torch.Tensor:
        """A layer's forward with its graph, and with the loss where the stage has one."""
        saving = self.ledger.saving() if self.ledger and units is not None else nullcontext()
        cutting: AbstractContextManager[list[Unit]] = nullcontext([])
        if units is not None:
            cutting = self._split.recording(self.ledger)
        with saving, cutting as found:
            root = self.layers[position](self._given(position, value))
            if position == len(self.layers) - 1 and self.loss is not None and target is not None:
                root = self.loss(root, target)
        if units is not None:
            units[:0] = found  # as a forward through all layers would have listed them
        return root

    def clear(self) -> None:
        """Forget gradients, losses and microbatches under way."""
        super().clear()
        self._kept.clear()
