"""Recomputing stage: it keeps only its layers' inputs and computes each layer again for its backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ppexec.stage.split_backward import Unit
from ppexec.stage.stage import Stage


class _Kept(NamedTuple):
    """What is kept of a microbatch between its F and its backward; the inputs are those of all layers."""

    inputs: list[torch.Tensor]
    output: torch.Tensor
    target: torch.Tensor | None


class _Entry(torch.autograd.Function):
    """The start of a layer's graph. It keeps the gradient of the layer's input with its memory layout.

    A leaf would change the layout, and kernels may add up in another order where the layout differs.
    """

    @staticmethod
    def forward(ctx: Any, taken: list[torch.Tensor], anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The value itself; the anchor makes it differentiable."""
        ctx.taken = taken
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Put the gradient into the list `taken`, and end."""
        ctx.taken.extend(gradients)
        return None, None, None


class RecomputingStage(Stage):
    """A Stage with less memory and a longer backward.

    Notes
    -----
    Each layer is recomputed on its own (Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost"). Its saved
    tensors live while its own backward runs; between actions the layers' inputs and the stage's output are held.
    Layers are recomputed in B, or in I where the backward is split. What W needs is then kept as it is without
    recomputation (see `SplitBackward`), so no layer is computed a third time. Kernels and their order are those of a
    Stage and dropout is keyed, so gradients have the same bits.
    """

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self._kept: dict[int, _Kept] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(
        self, microbatch: int, inputs: torch.Tensor | None, target: torch.Tensor | None, *, split: bool = False
    ) -> torch.Tensor:
        """Compute F as a Stage does. Raises ValueError if a layer changes its input, which is needed once more."""
        if not self.trains or inputs is None:
            return super().forward(microbatch, inputs, target, split=split)
        self._announce(microbatch)
        kept, value = _Kept([], inputs, target), inputs
        with torch.no_grad():
            for position, layer in enumerate(self.layers):
                kept.inputs.append(value)
                version, value = value._version, self._layer(position, value)
                if kept.inputs[-1]._version != version:
                    raise ValueError(
                        f"layer {self.first_layer + position} ({type(layer).__name__}) changes its input in place, so "
                        "it cannot be recomputed: take it without inplace=True, or do not recompute"
                    )
            if self.loss is not None and target is not None:
                self.losses[microbatch] = self.loss(value, target)
        self._kept[microbatch] = kept = kept._replace(output=value)
        if self.ledger:
            for tensor in (*kept.inputs, value):
                self.ledger.hold(tensor)
        return value.contiguous()

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute B: each layer again, from the last to the first, with its backward right after."""
        return self._anew(microbatch, gradient, None)

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Compute I as B, but keep what W needs."""
        units: list[Unit] = []
        self._units[microbatch] = units
        return self._anew(microbatch, gradient, units)

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

    def _run(
        self, position: int, value: torch.Tensor, target: torch.Tensor | None, units: list[Unit] | None
    ) -> torch.Tensor:
        """A layer's forward with its graph, followed by the loss if it is the model's last layer."""
        saving = self.ledger.saving() if self.ledger and units is not None else nullcontext()
        cutting: AbstractContextManager[list[Unit]] = nullcontext([])
        if units is not None:
            cutting = self._split.recording(self.ledger)
        with saving, cutting as found:
            root = self._layer(position, value)
            if position == len(self.layers) - 1 and self.loss is not None and target is not None:
                root = self.loss(root, target)
        if units is not None:
            units[:0] = found  # in the order of the layers, though they are recomputed from the last
        return root

    def clear(self) -> None:
        """Forget gradients, losses and all microbatches."""
        super().clear()
        self._kept.clear()
