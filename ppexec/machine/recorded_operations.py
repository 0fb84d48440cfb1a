"""Recorded operations: for the CPU what CUDA graphs are on a GPU. Operations are recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_Operation = tuple[Any, Sequence[Any], Mapping[str, Any], Any]
"""An operator, its arguments, and what it returned when it was recorded."""


class OperationRecorder:
    """Records work as the list of its operations; see `ppexec.machine.device.Recorder`.

    The work is done while it is recorded. A replay does each operation again on the same tensors, so that results stand
    where they stood. It is no faster than the work itself: it shows on any machine that a recording gives the same.

    Examples
    --------
    >>> value, results = torch.ones(2), []
    >>> replay = OperationRecorder().record(lambda: results.append(value * 3))
    >>> _ = value.fill_(2)
    >>> replay()
    >>> results
    [tensor([6., 6.])]
    """

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do and record work. Returns what replays it. Raises RuntimeError if a value is read from a tensor."""
        with _Recording() as recording:
            work()
        replay: Callable[[], None] = recording.replay
        return replay


class _Recording(TorchDispatchMode):
    """Notes every operation below autograd, those of a backward too."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[_Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read from a tensor, which a recording cannot do anew in every replay")
        result = func(*args, **(kwargs or {}))
        # Where its tensors are now: a tensor may be given other memory later (`tensor.data = ...`).
        there = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result))
        self._operations.append((func, *there))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do the operations again."""
        for func, args, kwargs, kept in self._operations:
            found = func(*args, **kwargs)
            # What aliases an argument (a view, a result in place) shows the new values already.
            if not any(each.alias_info for each in func._schema.returns):
                for old, new in zip(pytree.tree_leaves(kept), pytree.tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
