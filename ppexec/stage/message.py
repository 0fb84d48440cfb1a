"""What goes from stage to stage: outputs and gradients as messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppexec.models.shapes import TensorSpec, Tree, pack, tensors_in, unpack


def message_of(output: Tree) -> torch.Tensor:
    """An output as it is sent."""
    if isinstance(output, torch.Tensor):
        return output.detach().contiguous()
    tensors = [tensor.detach() for tensor in tensors_in(output)]
    return pack(tensors, tensors[0].device).contiguous()


def versions(value: Tree) -> list[int]:
    """How often each of a value's tensors was written, for telling whether one was changed in place."""
    return [tensor._version for tensor in tensors_in(value)]


def gradients_of(outputs: Sequence[torch.Tensor], message: torch.Tensor | None) -> list[torch.Tensor]:
    """The gradient of each differentiable output, from the message that came back."""
    if not outputs:
        return []
    if message is None:
        raise RuntimeError("a stage without a loss starts its backward from its output's gradient: give it")
    if len(outputs) == 1:
        return [message]
    return unpack(message, [TensorSpec.of(output) for output in outputs])
