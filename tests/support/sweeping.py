"""Functions that tests sweep: at the top of a module, so that other processes find them. Calls leave files behind."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A type of the caller's own."""

    cores: int
    name: str = "box"


def square(a: int) -> dict[str, int]:
    return {"square": a * a}


def total(a: float, b: float) -> float:
    return a + b


def cores_of(machine: Machine, path: Path) -> dict[str, object]:
    return {"cores": machine.cores, "is_path": isinstance(path, Path)}


def note(folder: str, label: object) -> None:
    """Leave a file for this call; two calls never share one."""
    (Path(folder) / f"{label}.{uuid.uuid4().hex}").touch()


def calls(folder: Path) -> Counter[str]:
    """How often each label was noted."""
    return Counter(path.name.split(".")[0] for path in folder.iterdir())


def counted(a: int, folder: str, pause_s: float = 0.0) -> dict[str, int]:
    note(folder, a)
    time.sleep(pause_s)
    return {"square": a * a, "process": os.getpid()}


def odd_fails(a: int, folder: str) -> int:
    """Fails for odd numbers, until the folder holds a file "mended"."""
    note(folder, a)
    if a % 2 and not (Path(folder) / "mended").exists():
        raise ArithmeticError(f"{a} is\nodd")
    return a


def ends_its_process(a: int, folder: str, deadly: int) -> int:
    """One number kills its process, every time."""
    note(folder, a)
    if a == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return a


def dies_once(a: int, folder: str, deadly: int) -> int:
    """One number kills its process the first time."""
    again = calls(Path(folder))[str(a)] > 0
    note(folder, a)
    if a == deadly and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    return a


def always_dies(a: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return a


def returns(a: int) -> object:
    import numpy as np

    return [np.float64(0.5), {"x": np.int64(3), "y": np.arange(2)}, float("inf"), {1, 2}, None][a]


def exits(a: int) -> None:
    raise SystemExit(a)
