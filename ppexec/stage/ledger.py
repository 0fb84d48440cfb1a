"""Ledger: the activation bytes of a stage, counted on the storages that autograd saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ppexec.stage.tensor_parallel import local


class Ledger:
    """Counts every storage that autograd saved or the runtime holds, each once, for as long as it is kept.

    Parameters
    ----------
    older : iterable of Tensor or UntypedStorage
        What exists before the step and is not counted: parameters, buffers and other tensors of the modules, targets,
        and tensors that layers keep for themselves.
    remembers : bool
        Keep track of all that was ever counted, for `survivors`.

    Attributes
    ----------
    level_bytes : int
        What is held now.

    Notes
    -----
    Bytes are those of whole storages, since a view keeps all of its storage alive. Each stage has a ledger of its own:
    where two stages of a rank share the tensor that they hand over, both count it.
    """

    def __init__(self, older: Iterable[torch.Tensor | torch.UntypedStorage], *, remembers: bool = False) -> None:
        # Kept alive, since a new storage may get the address of one that is gone.
        self._older = {storage._cdata: storage for storage in map(_storage, older)}
        self._remembered: dict[int, StorageWeakRef] | None = {} if remembers else None
        self._users: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.level_bytes = 0

    def saving(self) -> AbstractContextManager[None]:
        """A context in which what autograd saves is counted until autograd releases it."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def is_older(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's storage existed before the step, so that it is not counted."""
        return _key(tensor) in self._older

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        # Detached: a node that saves its own output would otherwise be in a reference cycle with it.
        return tensor if self.is_older(tensor) else _Saved(self, tensor.detach())

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until `drop`. The caller keeps the tensor alive."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._users:
            self._bytes[key] = storage.nbytes()
            self.level_bytes += self._bytes[key]
            if self._remembered is not None:
                self._remembered[key] = StorageWeakRef(storage)
        self._users[key] = self._users.get(key, 0) + 1

    def add(self, size_bytes: int) -> None:
        """Count bytes of a timed stage, which has costs and no tensors. A negative number takes bytes off."""
        self.level_bytes += size_bytes

    def drop(self, tensor: torch.Tensor) -> None:
        """End one `hold` of a tensor's storage."""
        key = _key(tensor)
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.level_bytes -= self._bytes.pop(key)

    def survivors(self) -> list[torch.UntypedStorage]:
        """Storages that were counted and still exist.

        Once their microbatch is done, only a layer that keeps tensors for itself can keep one alive.
        """
        alive = [reference for reference in (self._remembered or {}).values() if not reference.expired()]
        return [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in alive]


class _Saved:
    """A saved tensor, which is deleted when autograd releases it."""

    __slots__ = ("ledger", "tensor")

    def __init__(self, ledger: Ledger, tensor: torch.Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.hold(tensor)

    def __del__(self) -> None:
        self.ledger.drop(self.tensor)


def _unpack(saved: torch.Tensor | _Saved) -> torch.Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _storage(tensor: torch.Tensor | torch.UntypedStorage) -> torch.UntypedStorage:
    if isinstance(tensor, torch.UntypedStorage):
        return tensor
    return local(tensor).untyped_storage()


def _key(tensor: torch.Tensor) -> int:
    return _storage(tensor)._cdata


def tensors_of(layers: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters, buffers and tensor attributes of modules, all of which are older than any step."""
    found: list[torch.Tensor] = []
    for layer in layers:
        found += [*layer.parameters(), *layer.buffers()]
        for module in layer.modules():
            found += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return found


def parameter_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of the layers' parameters on this rank, each counted once."""
    return _sum_bytes(parameter for layer in layers for parameter in layer.parameters())


def gradient_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of the gradients that the layers' parameters have now, each counted once."""
    gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
    return _sum_bytes(gradient for gradient in gradients if gradient is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of an optimizer's moments and step counters, and of the copies that it updates in place of parameters."""
    states: Sequence[dict[str, Any]] = list(optimizer.state.values())
    own = {id(parameter) for parameter in parameters}
    copies = [each for group in optimizer.param_groups for each in group["params"] if id(each) not in own]
    kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return _sum_bytes([*copies, *kept])


def _sum_bytes(tensors: Iterable[torch.Tensor]) -> int:
    sizes = {id(tensor): local(tensor).nbytes for tensor in list(tensors)}
    return sum(sizes.values())
