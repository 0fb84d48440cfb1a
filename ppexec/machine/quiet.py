"""Quiet: keeps garbage collection, and processes that finish early, from disturbing what is measured."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import meet

_modules_then = 0  # how many were imported when objects were frozen last


def freeze_what_stays() -> None:
    """Collect the last run's garbage, then freeze all objects that are left, so that later collections are short.

    Most of these belong to imported modules. Call it before a run builds its model: a frozen model would stay in memory
    after its run.
    """
    global _modules_then
    if len(sys.modules) > _modules_then:
        _modules_then = len(sys.modules)
        gc.unfreeze()  # what was frozen before may be garbage by now
        gc.collect()
        gc.freeze()
    else:
        gc.collect()


@contextlib.contextmanager
def undisturbed(mesh: DeviceMesh | None) -> Iterator[None]:
    """Let all processes begin and end the body together, and collect no garbage in it. Collective.

    They end together because a rank that finishes early would go on to its next body, collect garbage for a tenth of a
    second, and take a core from ranks that still compute.

    Parameters
    ----------
    mesh : DeviceMesh or None
        The processes; None if this is the only one.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        meet(mesh)
        yield
        meet(mesh)  # not after an error: the run ends then
    finally:
        if was_enabled:
            gc.enable()
