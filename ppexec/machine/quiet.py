"""Quiet: what keeps a process's own housekeeping out of what it measures."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import meet


def set_apart_what_stays() -> None:
    """Collect what is left of the run before, and let no later collection look at what modules hold: it takes long."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def undisturbed(mesh: DeviceMesh | None) -> Iterator[None]:
    """All processes begin the body at once, and no garbage is collected in it.

    Nor do they leave it before the last is done: what a rank does after a step, collecting garbage for a tenth of a
    second, would take a core from those that are still at it.
    """
    gc.collect()
    gc.disable()
    try:
        meet(mesh)
        yield
        meet(mesh)
    finally:
        gc.enable()
