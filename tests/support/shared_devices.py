"""Shared devices: their engine where nobody has to share, which must give what the other engines give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppsim import Conditions, Network, Schedule, StageCost
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.engines.shared_engine import run_shared
from ppsim.simulation.sharing import Devices
from ppsim.simulation.timed_program import TimedProgram


def check_with_a_core_for_each(
    schedule: Schedule, costs: Sequence[StageCost], network: Network, conditions: Conditions
) -> None:
    """Hold the engine of shared devices, with one that has a core for each rank, against ranks alone."""
    timed = TimedProgram.of(schedule.program, costs, network, conditions)
    devices = Devices(of_rank=(0,) * schedule.ranks, sharing="turns", cores=schedule.ranks, speeds=())
    alone, shared = run_engine("simpy", timed), run_shared(timed, devices)
    for name in ("start_s", "end_s", "message_arrival_s", "side_start_s", "side_end_s"):
        if len(timed.side.stage) or not name.startswith("side"):
            assert np.array_equal(getattr(alone, name), getattr(shared, name)), name
