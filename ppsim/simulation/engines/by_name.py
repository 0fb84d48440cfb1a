"""By name: the engine that is asked for."""

from __future__ import annotations

from ppsim.simulation.engines.times import Times
from ppsim.simulation.timed_program import Load

ENGINES = ("simpy", "compiled")


def run_engine(name: str, load: Load) -> Times:
    """Run a program that can end with the named engine."""
    if name == "simpy":
        if load.devices is not None and load.devices.are_shared:
            from ppsim.simulation.engines.shared_engine import run_shared

            return run_shared(load, load.devices)
        from ppsim.simulation.engines.simpy_engine import run_simpy

        return run_simpy(load)
    if name == "compiled":
        from ppsim.simulation.engines.compiled_engine import (
            run_compiled,  # numba takes a second to import, so only who asks pays
        )

        return run_compiled(load)
    raise ValueError(f"unknown engine {name!r}: known are {', '.join(ENGINES)}")
