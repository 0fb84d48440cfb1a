"""Ledger: the activation bytes of a stage, counted on what autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn


class Ledger:
    """Counts every storage that autograd saved or the runtime holds, each once, while it is kept.

    Left out is what is older than the step: parameters, buffers and other tensors of the modules, targets. The bytes
    are those of whole storages, since a view keeps all of its storage alive. A ledger is one stage's: where two stages
    of a rank share the tensor that they hand over, each of them counts it, as each needs it.
    """

    def __init__(self, older: Iterable[torch.Tensor]) -> None:
        self._older = {_key(tensor) for tensor in older}
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
        key = _key(tensor)
        if key not in self._users:
            self._bytes[key] = tensor.untyped_storage().nbytes()
            self.level_bytes += self._bytes[key]
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


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(layers: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters, buffers and plain tensor attributes of modules: what is older than any step."""
    found: list[torch.Tensor] = []
    for layer in layers:
        found += [*layer.parameters(), *layer.buffers()]
        for module in layer.modules():
            found += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return found
