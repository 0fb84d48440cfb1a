"""Tensor parallelism: a layer sharded over the ranks of tp by PyTorch's own DTensor, following its model's plan.

Every tp rank draws the full parameters of one layer at a time, from (seed, layer, name) alone, and keeps its slices: no
communication, and any tp starts from the same model. Between layers activations are plain tensors, alike on all ranks
of tp, so a pipeline's messages go from a tp rank to the same tp rank. Inside, the styles' hooks turn tensors into
DTensors and back; what they exchange in a forward is waited for there, and what they exchange in a backward is part of
the gradient for the input: a backward split in I and W communicates in I alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:  # imported where needed: it takes half a second
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from ppexec.models.model import Model

_SIZES = {  # what a style cuts: (name of the size, column-wise), (name of the size, row-wise)
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("embedding_dim", "num_embeddings"),
}


def check_plan(model: Model, tp: int) -> None:
    """Refuse what cannot be sharded over tp ranks; the layers may be on the meta device.

    Raises ValueError: a plan for what a layer does not have, a module that the style does not know, a size that does
    not divide by tp.
    """
    if tp > 1 and model.plan is not None:
        for index, layer in enumerate(model.layers):
            for name, module, style in _styled(layer, model.plan(layer), index):
                _check_style(f"layer {index} ({type(layer).__name__}) {name}".rstrip(), module, style, tp)


def planned_modules(model: Model) -> list[nn.Module]:
    """Every module for which the model's plan has a style, layer by layer."""
    if model.plan is None:
        return []
    return [m for i, layer in enumerate(model.layers) for _, m, _ in _styled(layer, model.plan(layer), i)]


def _styled(
    layer: nn.Module, plan: Mapping[str, ParallelStyle], index: int
) -> Iterator[tuple[str, nn.Module, ParallelStyle]]:
    """Each module that the plan names, with its style; `*` stands for any part of a name, "" for the layer itself."""
    for pattern, style in plan.items():
        parts = pattern.split(".")
        found = [
            (name, module)
            for name, module in layer.named_modules()
            if len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not found:
            raise ValueError(
                f"the plan of layer {index} ({type(layer).__name__}) names {pattern!r}, which it does not have: it has "
                f"{', '.join(name for name, _ in layer.named_modules() if name) or 'no modules inside'}"
            )
        yield from ((name, module, style) for name, module in found)


def _check_style(where: str, module: nn.Module, style: ParallelStyle, tp: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if not isinstance(style, ColwiseParallel | RowwiseParallel):
        return
    sizes = next((sizes for kind, sizes in _SIZES.items() if isinstance(module, kind)), None)
    if sizes is None:
        raise ValueError(
            f"{where} is a {type(module).__name__}: {type(style).__name__} shards nn.Linear and nn.Embedding alone"
        )
    name = sizes[isinstance(style, RowwiseParallel)]
    size = getattr(module, name)
    if size % tp:
        raise ValueError(f"{where}: {name} {size} does not divide by tp={tp}: take a multiple of {tp}, or another tp")


def shard_layer(layer: nn.Module, model: Model, mesh: DeviceMesh | None, *, index: int) -> nn.Module:
    """Keep this rank's slices of a layer's full parameters, as its model plans; returns the layer.

    mesh: of the tp dimension alone; None, or one of a single rank, leaves the layer as it is. No communication.
    """
    if mesh is None or mesh.size() == 1 or model.plan is None:
        return layer
    from torch.distributed.tensor.parallel import parallelize_module

    for _, module, style in list(_styled(layer, model.plan(layer), index)):
        parallelize_module(module, mesh, style, src_data_rank=None)
        module.register_forward_hook(_wait_for_output)
    return layer


class _Wait(torch.autograd.Function):
    """A tensor that a collective is still filling, once it is full."""

    @staticmethod
    def forward(ctx: Any, pending: Any) -> torch.Tensor:
        """The tensor itself."""
        full = pending.wait()
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient itself."""
        return gradient


def _wait_for_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Styles give results that are still under way; messages, ledgers and kernels here take tensors that are there."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return pytree.tree_map(lambda leaf: _Wait.apply(leaf) if isinstance(leaf, AsyncCollectiveTensor) else leaf, output)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its slice if it is sharded over tp, else the tensor itself. Shares memory."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's slice of a parameter's gradient, which is cut as the parameter is; None if there is none.

    A parameter alike on all ranks of tp whose ranks saw parts of the data (sequence parallelism) has a gradient that is
    still to be added up over them: the sum takes the gradient's place. So this is a collective of tp.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    placements = getattr(parameter, "placements", None)
    if placements is not None and gradient.placements != placements:  # type: ignore[attr-defined]
        parameter.grad = gradient = gradient.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(gradient)


def slice_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The part of a full tensor that lies where this rank's part of a parameter lies."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return full
    return local(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))


def is_sharded(layers: Sequence[nn.Module]) -> bool:
    """Whether any parameter is a DTensor."""
    return any(hasattr(parameter, "placements") for layer in layers for parameter in layer.parameters())
