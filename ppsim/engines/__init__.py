"""Engines: the simulated clocks. Each runs a program to the times of its rows and messages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ppsim.engines.simpy_engine import run_simpy
from ppsim.engines.times import Times
from ppsim.network import Network
from ppsim.program import Program


def _run_compiled(
    program: Program, durations_s: npt.NDArray[np.float64], message_bytes: npt.NDArray[np.int64], network: Network
) -> Times:
    from ppsim.engines.compiled_engine import run_compiled  # numba takes a second to import, so only who asks pays

    return run_compiled(program, durations_s, message_bytes, network)


_ENGINES = {"simpy": run_simpy, "compiled": _run_compiled}


def run_engine(
    name: str,
    program: Program,
    durations_s: npt.NDArray[np.float64],
    message_bytes: npt.NDArray[np.int64],
    network: Network,
) -> Times:
    """Run a checked program with the named engine."""
    try:
        engine = _ENGINES[name]
    except KeyError:
        raise ValueError(f"unknown engine {name!r}: known are {', '.join(_ENGINES)}") from None
    return engine(program, durations_s, message_bytes, network)
