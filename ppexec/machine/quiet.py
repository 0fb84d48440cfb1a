"""Quiet: keeps garbage collection and late processes out of what is measured."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from torch.distributed.device_mesh import DeviceMesh

from ppexec.machine.mesh import meet


def set_apart_what_stays() -> None:
    """Collect the garbage of the last run, and exclude what is left from later ones, which makes them short."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


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
