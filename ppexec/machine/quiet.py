"""Quiet: keeps garbage collection and late processes out of what is measured."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import meet

_modules_set_apart = 0


def set_apart_what_stays() -> None:
    """Collect the garbage of the last run, and exclude imported modules from later collections, which makes them short.

    Nothing is excluded for good that belongs to a run: a model would stay in memory when its run is over.
    """
    global _modules_set_apart
    if len(sys.modules) > _modules_set_apart:
        _modules_set_apart = len(sys.modules)
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    else:
        gc.collect()


@contextlib.contextmanager
def undisturbed(mesh: DeviceMesh | None) -> Iterator[None]:
    """Let all processes begin and end the body together, and collect no garbage in it. Collective.

    They end together because a rank that is done collects garbage for a tenth of a second, and would take a core from
    ranks that still compute.

    Parameters
    ----------
    mesh : DeviceMesh or None
        The processes; None if this is the only one.
    """
    gc.collect()
    gc.disable()
    try:
        meet(mesh)
        yield
        meet(mesh)
    finally:
        gc.enable()
