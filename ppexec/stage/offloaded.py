"""Offloaded: the tensors that one microbatch keeps on a stage, which can go to host memory and come back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from ppexec.stage.ledger import Ledger

HostBuffer = Callable[[int], torch.Tensor]
"""Makes so many bytes in host memory."""


class _View(NamedTuple):
    """What makes a tensor of a storage."""

    key: int  # of the storage, among those of its microbatch
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def on(self, storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype, device=device).set_(storage, self.offset, self.size, self.stride)


class _Saved:
    """A tensor that autograd saved, which is deleted when autograd releases it; None while it is away."""

    __slots__ = ("__weakref__", "ledger", "tensor", "view")

    def __init__(self, ledger: Ledger | None, tensor: torch.Tensor) -> None:
        self.ledger = ledger
        self.tensor: torch.Tensor | None = tensor
        self.view: _View | None = None
        if ledger:
            ledger.hold(tensor)

    def __del__(self) -> None:
        if self.ledger and self.tensor is not None:
            self.ledger.drop(self.tensor)


class Offloadable:
    """What a microbatch keeps on a stage from its F on: what autograd saved, and the stage's input and output.

    Parameters
    ----------
    older : iterable of Tensor
        What is older than the step and stays: parameters, buffers and other tensors of the modules, and targets.
    ledger : Ledger or None
        Counts what is on the device.

    Notes
    -----
    Storages are copied, each once, so that tensors which share one still do afterwards. While they are away, the
    stage's own tensors have a single element in the place of all; nothing computes with them then. What a layer keeps
    from one microbatch to the next, such as a table, is copied along, unless a ledger knows it to be older.
    """

    def __init__(self, older: Iterable[torch.Tensor], ledger: Ledger | None) -> None:
        self._older = {tensor.untyped_storage()._cdata for tensor in older}
        self._ledger = ledger
        self._saved: list[weakref.ref[_Saved]] = []
        self._counted: list[torch.Tensor] = []
        self._others: list[torch.Tensor] = []
        self._views: list[tuple[torch.Tensor, _View]] = []
        self._host: list[torch.Tensor] = []
        self._device = torch.device("cpu")

    def saving(self) -> AbstractContextManager[None]:
        """A context in which what autograd saves can be moved; with a ledger it is counted too."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if _key(tensor) in self._older or (self._ledger and self._ledger.is_older(tensor)):
            return tensor
        # Detached, since a node that saves its own output would keep its graph alive.
        saved = _Saved(self._ledger, tensor.detach())
        if not (tensor.is_conj() or tensor.is_neg()):  # a view that a storage does not tell of stays where it is
            self._saved.append(weakref.ref(saved))
        return saved

    def keep(self, counted: Iterable[torch.Tensor], others: Iterable[torch.Tensor] = ()) -> None:
        """Move these too: what the stage holds, which its ledger counts, and what else may share their storages."""
        self._counted, self._others = list(counted), list(others)

    def leave(self, host_buffer: HostBuffer, uses: Callable[[torch.Tensor], None]) -> int:
        """Copy everything to host memory and let go of it on the device; gives the bytes that are copied.

        uses: is told of each piece that is copied, see `Stream.uses` of the stream that copies.
        """
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}  # by address: number, storage

        def view_of(tensor: torch.Tensor) -> _View:
            storage = tensor.untyped_storage()
            number, _ = storages.setdefault(storage._cdata, (len(storages), storage))
            return _View(number, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

        saved = [each for each in (reference() for reference in self._saved) if each is not None]
        for each in saved:
            if each.tensor is not None:
                each.view = view_of(each.tensor)
        self._views = [(tensor, view_of(tensor)) for tensor in self._counted]
        self._views += [(each, view_of(each)) for each in self._others if _key(each) in storages]
        for _, storage in storages.values():
            self._device = storage.device
            host = host_buffer(storage.nbytes())
            piece = _bytes_of(storage)
            host.copy_(piece, non_blocking=True)
            uses(piece)
            self._host.append(host)
        for each in saved:
            if self._ledger and each.tensor is not None:
                self._ledger.drop(each.tensor)
            each.tensor = None
        if self._ledger:
            for tensor in self._counted:  # before any loses its storage: one may be there twice, as input and output
                self._ledger.drop(tensor)
        for tensor, view in self._views:
            one = torch.empty(1, dtype=view.dtype, device=self._device)
            tensor.data = one.as_strided(view.size, [0] * len(view.size))
        return sum(host.nbytes for host in self._host)

    def come_back(self, uses: Callable[[torch.Tensor], None]) -> int:
        """Copy everything back, in new memory; gives the bytes that are copied.

        uses: is told of each new piece, see `Stream.uses` of the stream that computes with it.
        """
        storages = []
        for host in self._host:
            fresh = torch.empty(host.nbytes, dtype=torch.uint8, device=self._device)
            fresh.copy_(host, non_blocking=True)
            uses(fresh)
            storages.append(fresh.untyped_storage())
        size_bytes = sum(host.nbytes for host in self._host)
        self._host = []
        for reference in self._saved:
            saved = reference()
            if saved is not None and saved.view is not None:
                saved.tensor = saved.view.on(storages[saved.view.key], self._device)
                if self._ledger:
                    self._ledger.hold(saved.tensor)
        for tensor, view in self._views:
            tensor.data = view.on(storages[view.key], self._device)
        if self._ledger:
            for tensor in self._counted:
                self._ledger.hold(tensor)
        self._views = []
        return size_bytes


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unpack(saved: torch.Tensor | _Saved) -> Any:
    return saved.tensor if isinstance(saved, _Saved) else saved
