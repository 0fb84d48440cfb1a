"""By name: the engine that was asked for."""

from __future__ import annotations

from ppsim.errors import InputError
from ppsim.simulation.engines.times import StepTimes
from ppsim.simulation.timed_program import TimedProgram

ENGINES = ("simpy", "compiled")


def run_engine(name: str, timed: TimedProgram) -> StepTimes:
    """Run a program that can end.

    Parameters
    ----------
    name : "simpy" or "compiled"
        The engine.
    timed : TimedProgram
        What is run.

    Returns
    -------
    StepTimes
        Seconds from the step's start; the same bits from every engine.

    Raises
    ------
    InputError
        For an unknown engine, and for shared devices with "compiled".
    """
    if name == "simpy":
        if timed.devices is not None:
            from ppsim.simulation.engines.shared_engine import run_shared

            return run_shared(timed, timed.devices)
        if timed.graph is not None:
            from ppsim.simulation.engines.posting_engine import run_posting

            return run_posting(timed)
        from ppsim.simulation.engines.simpy_engine import run_simpy

        return run_simpy(timed)
    if name == "compiled":
        # Imported here because numba takes a second to import.
        from ppsim.simulation.engines.compiled_engine import run_compiled

        return run_compiled(timed)
    raise InputError(f"unknown engine {name!r}: known are {', '.join(ENGINES)}")
