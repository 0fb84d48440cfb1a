"""Profiling: the run in which layers are profiled whose times a run with timed compute then waits."""

from __future__ import annotations

from dataclasses import replace

from ppexec.config.config import RunConfig
from ppexec.machine.environment import usable_cores


def profiling_config(config: RunConfig) -> RunConfig:
    """Give the same model a run that profiles it: real compute, and no more ranks than there are cores.

    Ranks with a core each are not slowed down by one another. The schedule splits its backwards, so that I and W are
    timed too.
    """
    most = min(config.ranks, usable_cores())
    return replace(
        config.plain(),
        schedule="zb-h1",
        ranks=max(ranks for ranks in range(1, most + 1) if config.layers % ranks == 0),
        stages_per_rank=None,
        partition="even",
        compute="real",
        costs=None,
        threads=1,
    )
