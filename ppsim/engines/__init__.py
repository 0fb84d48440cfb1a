"""Engines: the simulated clocks. Each runs a load to the times of its rows and messages."""

from __future__ import annotations

from ppsim.engines.load import Load
from ppsim.engines.times import Times

ENGINES = ("simpy", "compiled")


def run_engine(name: str, load: Load) -> Times:
    """Run a program that can end with the named engine."""
    if name == "simpy":
        if load.devices is not None and load.devices.are_shared:
            from ppsim.engines.shared_engine import run_shared

            return run_shared(load, load.devices)
        from ppsim.engines.simpy_engine import run_simpy

        return run_simpy(load)
    if name == "compiled":
        from ppsim.engines.compiled_engine import run_compiled  # numba takes a second to import, so only who asks pays

        return run_compiled(load)
    raise ValueError(f"unknown engine {name!r}: known are {', '.join(ENGINES)}")
