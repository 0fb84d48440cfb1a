"""Hypothesis profiles: `default` is quick; `thorough` takes hundreds of examples of every property, `fast` few.

`pytest -m fast` takes `fast` by itself. Others are chosen with `pytest --hypothesis-profile thorough` or
HYPOTHESIS_PROFILE=thorough. No deadlines: shared machines stall.
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
settings.register_profile("fast", max_examples=8, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Beginnings of the names of tests that start processes of their own or take seconds.
_SLOW = (
    "tests/bad_input/test_flags.py",
    "tests/ppexec/experiment/",
    "tests/ppexec/models/test_gpt.py::test_the_command_line",
    "tests/ppexec/models/test_models.py::test_what_a_model_prints",
    "tests/ppexec/models/test_seeds.py::test_streams_are_the_same_in_every_process",
    "tests/ppexec/stage/test_tied.py::test_under_torchrun",
    "tests/ppexec/test_cli.py",
    "tests/ppexec/test_torchrun.py",
    "tests/ppexec/transport/test_nccl_rules.py",
    "tests/ppexec/verify/test_pytorch_runtime.py",
    "tests/ppexec/workers/",
    "tests/ppsim/advice/",
    "tests/ppsim/cli/test_examples.py",
    "tests/ppsim/cli/test_explore_command.py",
    "tests/ppsim/cli/test_flags.py::test_any_words_give_an_answer_or_one_message",
    "tests/ppsim/explain/test_attribution_options.py",
    "tests/ppsim/explorer/test_page.py",
    "tests/ppsim/runs/test_kineto.py",
    "tests/ppsim/search/test_search.py",
    "tests/ppsim/search/test_branch_and_bound.py",
    "tests/ppsim/sweep/",
    "tests/ppsim/test_conditions.py::test_every_option_is_drawn",
    "tests/ppsim/variation/test_jitter_fit.py",
    "tests/studies/",
    "tests/test_readme.py::test_commands_run",
    "tests/test_readme.py::test_the_executor",
)


def pytest_configure(config: pytest.Config) -> None:
    """Take few examples where the fast tests alone are wanted and no profile is."""
    if config.getoption("markexpr") == "fast" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `fast` what neither uses the pool of workers nor is slow."""
    for item in items:
        if "pool" not in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(_SLOW):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole test session: the first costs seconds, every further run milliseconds."""
    from ppexec import WorkerPool

    with WorkerPool() as workers:
        yield workers
