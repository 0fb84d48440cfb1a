"""Ledger: the activation bytes of a stage, counted on what autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ppexec.stage.tensor_parallel import local


class Ledger:
    """Counts every storage that autograd saved or the runtime holds, each once, while it is kept.

    Left out is what is older than the step: parameters, buffers and other tensors of the modules, targets. The bytes
    are those of whole storages, since a view keeps all of its storage alive. A ledger is one stage's: where two stages
    of a rank share the tensor that they hand over, each of them counts it, as each needs it.

    remembers: keep track of all that was ever saved, for `survivors`.
    """

    def __init__(self, older: Iterable[torch.Tensor | torch.UntypedStorage], *, remembers: bool = False) -> None:
        # Kept alive, since a new storage may get the address of one that is gone.
        self._older = {storage._cdata: storage for storage in map(_storage, older)}
        self._remembered: dict[int, StorageWeakRef] | None = {} if remembers else None
        self._users: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.level_bytes = 0

    def saving(self) -> AbstractContextManager[None]:
        """Inside, what autograd saves is counted until autograd lets go of it."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        # Detached, since an output that a node saved of itself would keep its own graph alive.
        return tensor if _key(tensor) in self._older else _Saved(self, tensor.detach())

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is dropped."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._users:
            self._bytes[key] = storage.nbytes()
            self.level_bytes += self._bytes[key]
            if self._remembered is not None:
                self._remembered[key] = StorageWeakRef(storage)
        self._users[key] = self._users.get(key, 0) + 1

    def add(self, size_bytes: int) -> None:
        """Count bytes that are stated, not allocated (negative: given back)."""
        self.level_bytes += size_bytes

    def drop(self, tensor: torch.Tensor) -> None:
        """End one `hold` of a tensor's storage."""
        key = _key(tensor)
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.level_bytes -= self._bytes.pop(key)

    def survivors(self) -> list[torch.UntypedStorage]:
        """What was counted once and is still there: if its microbatch is over, a cache that is older than any step."""
        alive = [reference for reference in (self._remembered or {}).values() if not reference.expired()]
        return [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in alive]


class _Saved:
    """A saved tensor; it dies when autograd releases it."""

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
    """Parameters, buffers and plain tensor attributes of modules: what is older than any step."""
    found: list[torch.Tensor] = []
    for layer in layers:
        found += [*layer.parameters(), *layer.buffers()]
        for module in layer.modules():
            found += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return found


def parameter_bytes(layers: Iterable[nn.Module]) -> int:
    """The layers' parameters on this rank, each once."""
    return _sum_bytes(parameter for layer in layers for parameter in layer.parameters())


def gradient_bytes(layers: Iterable[nn.Module]) -> int:
    """The gradients that the layers' parameters have by now, each once."""
    gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
    return _sum_bytes(gradient for gradient in gradients if gradient is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps from step to step: moments and step counters; 0 before its first step."""
    states: Sequence[dict[str, Any]] = list(optimizer.state.values())
    return _sum_bytes(value for state in states for value in state.values() if isinstance(value, torch.Tensor))


def _sum_bytes(tensors: Iterable[torch.Tensor]) -> int:
    sizes = {id(tensor): local(tensor).nbytes for tensor in list(tensors)}
    return sum(sizes.values())
