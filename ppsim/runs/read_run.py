"""Read run: the measured steps of a job, from whichever files a framework wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.runs.kineto import is_kineto, read_kineto
from ppsim.runs.megatron import is_megatron, read_megatron
from ppsim.runs.own import is_own, read_own
from ppsim.runs.primus import is_primus, read_primus
from ppsim.runs.run import Run


class _Format(NamedTuple):
    fits: Callable[[Path], bool]
    read: Callable[[Path], Run]
    what: str


_FORMATS = {
    "ppsim": _Format(is_own, read_own, "step_<n>.trace as `ppsim import` writes them, or one saved trace"),
    "primus": _Format(is_primus, read_primus, "config.json and pp_rank_<r>.json of Primus's --dump_pp_data"),
    "kineto": _Format(is_kineto, read_kineto, "a Chrome trace (.json, .json.gz) of each rank by torch.profiler"),
    "megatron": _Format(is_megatron, read_megatron, "a log (.log, .txt, .out) with Megatron-LM's times across ranks"),
}


def formats() -> list[str]:
    """The formats that can be read."""
    return list(_FORMATS)


@checked
def read_run(path: str | Path, format: str = "auto") -> Run:
    """Read the measured steps of a job.

    Parameters
    ----------
    path : str or Path
        A folder with a file for each pipeline rank, or a saved trace.
    format : "auto", "ppsim", "primus", "kineto" or "megatron"
        What wrote the files:

        - "ppsim": steps that `ppsim import` wrote, or one saved trace.
        - "primus": `config.json` and `pp_rank_<r>.json`, which AMD's Primus writes with `--dump_pp_data`.
        - "kineto": a Chrome trace of each rank, `.json` or `.json.gz`, that `torch.profiler` wrote of a job on
          PyTorch's pipeline runtime, whose ranges are named `PP:0F1`.
        - "megatron": what Megatron-LM printed with `--timing-log-level 2 --timing-log-option all`, one log or a folder
          of a job's. Its timers are sums over a step: the run's traces are laid out from them, and
          `run.environment["unknown"]` says what that leaves open.

        "auto" looks which it is.

    Returns
    -------
    Run
        A trace for each step. What the files do not tell is not known in the traces either.

    Raises
    ------
    InputError
        Names the rank, step or range that is missing or does not fit, or says which files were looked for.
    OSError
        If a file cannot be read.

    Notes
    -----
    Clocks of different ranks are aligned by the messages between them (`ppsim.runs.clocks`).
    """
    path = Path(path)
    if format != "auto":
        if format not in _FORMATS:
            raise InputError(f"unknown format {format!r}: take auto, {', '.join(_FORMATS)}")
        return _FORMATS[format].read(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    for each in _FORMATS.values():
        if each.fits(path):
            return each.read(path)
    known = "; ".join(f"{name}: {each.what}" for name, each in _FORMATS.items())
    raise InputError(f"{path} holds no run that can be read. Known are: {known}")
