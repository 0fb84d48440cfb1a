"""Hypothesis profiles: `default` is quick; `thorough` takes hundreds of examples of every property.

Chosen with `pytest --hypothesis-profile thorough` or HYPOTHESIS_PROFILE=thorough. No deadlines: shared machines stall.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from ppexec import WorkerPool

# Tests share the modules in tests.support; importlib mode leaves it to us to make them importable.
# Never put this folder itself on the path: tests/ppsim would stand in for ppsim.
sys.path.insert(0, str(Path(__file__).parents[1]))

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", max_examples=40, **_COMMON)
settings.register_profile("thorough", max_examples=600, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole test session: the first costs seconds, every further run milliseconds."""
    from ppexec import WorkerPool

    with WorkerPool() as workers:
        yield workers
