"""Tensor parallelism: layers sharded over the ranks of tp by PyTorch's DTensor, as their model plans.

Every rank of tp draws the full parameters of one layer at a time, from (seed, layer, name) alone, and keeps its slices.
That needs no communication, and any tp starts from the same model. Between layers activations are plain tensors, the
same on all ranks of tp, so a pipeline's messages go from each rank of tp to the same rank of tp. Inside a layer the
styles' hooks turn tensors into DTensors and back. Their communication in a forward is waited for there. In a backward
it belongs to the gradient of the input, so a backward that is split communicates in I only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ppsim.errors import InputError

if TYPE_CHECKING:  # else imported where needed: DTensor takes half a second
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from ppexec.models.model import Model

_SIZES = {  # name of the size that the column-wise, and that the row-wise style cuts
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("embedding_dim", "num_embeddings"),
}


def check_plan(model: Model, tp: int) -> None:
    """Check that a model can be sharded over tp ranks. Its layers may be on the meta device.

    Raises
    ------
    InputError
        For a plan that names a module which the layer does not have, a module that the style cannot shard, or a size
        that does not divide by tp.
    """
    if tp > 1 and model.plan is not None:
        for index, layer in enumerate(model.layers):
            for name, module, style in _styled(layer, model.plan(layer), index):
                _check_style(f"layer {index} ({type(layer).__name__}) {name}".rstrip(), module, style, tp)


def planned_modules(model: Model) -> list[nn.Module]:
    """The modules for which the model's plan has a style, layer by layer."""
    if model.plan is None:
        return []
    return [m for i, layer in enumerate(model.layers) for _, m, _ in _styled(layer, model.plan(layer), i)]


def _styled(
    layer: nn.Module, plan: Mapping[str, ParallelStyle], index: int
) -> Iterator[tuple[str, nn.Module, ParallelStyle]]:
    """Each module that the plan names, with its style; `*` is any part of a name, "" the layer itself."""
    for pattern, style in plan.items():
        parts = pattern.split(".")
        found = [
            (name, module)
            for name, module in layer.named_modules()
            if len(name.split(".")) == len(parts) and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not found:
            raise InputError(
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
        raise InputError(
            f"{where} is a {type(module).__name__}, but {type(style).__name__} shards only nn.Linear and nn.Embedding: "
            "leave it out of the plan"
        )
    name = sizes[isinstance(style, RowwiseParallel)]
    size = getattr(module, name)
    if size % tp:
        raise InputError(f"{where}: {name} {size} does not divide by tp={tp}: take a multiple of {tp}, or another tp")


def shard_layer(layer: nn.Module, model: Model, mesh: DeviceMesh | None, *, index: int) -> nn.Module:
    """Keep only this rank's slices of a layer's full parameters, as its model plans, without communication.

    Parameters
    ----------
    layer : Module
        Real and whole.
    model : Model
        Has the plan.
    mesh : DeviceMesh or None
        Of the tp dimension. None, or a mesh of one rank, leaves the layer as it is.
    index : int
        The layer's position in the chain, for errors.

    Returns
    -------
    Module
        The same layer.
    """
    if mesh is None or mesh.size() == 1 or model.plan is None:
        return layer
    from torch.distributed.tensor.parallel import parallelize_module

    for _, module, style in list(_styled(layer, model.plan(layer), index)):
        parallelize_module(module, mesh, style, src_data_rank=None)
        module.register_forward_hook(_wait_for_output)
    return layer


class _Wait(torch.autograd.Function):
    """Waits for a tensor that a collective is still filling."""

    @staticmethod
    def forward(ctx: Any, pending: Any) -> torch.Tensor:
        """The tensor, once it is complete."""
        full = pending.wait()
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient itself."""
        return gradient


def _wait_for_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Wait for the results of styles, since messages, ledgers and kernels take tensors that are complete."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return pytree.tree_map(lambda leaf: _Wait.apply(leaf) if isinstance(leaf, AsyncCollectiveTensor) else leaf, output)


def placements(tensor: torch.Tensor) -> str:
    """How a tensor is laid out over tp; empty for a plain tensor."""
    return str(getattr(tensor, "placements", ""))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank of tp has a slice of its own of the tensor."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a tensor that is sharded over tp, else the tensor itself. It shares the memory."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's slice of a parameter's gradient, or None without one. Collective over tp.

    Notes
    -----
    Under sequence parallelism the ranks of tp see parts of the data. The gradient of a replicated parameter is then
    still to be added up over them. It is replaced by that sum.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    placements = getattr(parameter, "placements", None)
    if placements is not None and gradient.placements != placements:  # type: ignore[attr-defined]
        parameter.grad = gradient = gradient.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(gradient)


def slice_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a full tensor, cut as the parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return full
    return local(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
