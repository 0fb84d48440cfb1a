"""Which tests run: Hypothesis profiles, the fast ones, and samples of tables whose every entry is a run.

Profile `default` is quick; `thorough` takes hundreds of examples of every property, `fast` few. `pytest -m fast` takes
`fast` by itself. Others are chosen with `pytest --hypothesis-profile thorough` or HYPOTHESIS_PROFILE=thorough. No
deadlines: shared machines stall.

`@pytest.mark.one_in(n)` on a parametrized test keeps one of n entries. All run under `thorough`, and where tests are
named on the command line.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
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
# The same examples every time, so that a run of the tests fails for a change and not for a draw; `thorough` draws anew.
settings.register_profile("default", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=600, **_COMMON)
settings.register_profile("fast", max_examples=8, derandomize=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Beginnings of the names of tests that start processes of their own or take seconds.
_SLOW = (
    "tests/bad_input/test_flags.py",
    "tests/fuzz/test_kept.py",
    "tests/ppexec/experiment/",
    "tests/ppexec/measure/test_footprint.py",
    "tests/ppexec/stage/test_offloaded.py",
    "tests/ppexec/stage/test_recompute_action.py",
    "tests/ppexec/stage/test_recomputing_stage.py",
    "tests/ppexec/test_session.py",
    "tests/ppexec/measure/test_allocator.py",
    "tests/ppexec/models/test_gpt.py::test_the_command_line",
    "tests/ppexec/models/test_models.py::test_what_a_model_prints",
    "tests/ppexec/models/test_seeds.py::test_streams_are_the_same_in_every_process",
    "tests/ppexec/stage/test_ledger.py",
    "tests/ppexec/stage/test_sharded.py",
    "tests/ppexec/stage/test_tied.py::test_under_torchrun",
    "tests/ppexec/test_cli.py",
    "tests/ppexec/test_torchrun.py",
    "tests/ppexec/transport/test_nccl_rules.py",
    "tests/ppexec/verification/test_precision.py",
    "tests/ppexec/verification/test_pytorch_runtime.py",
    "tests/ppexec/verification/test_sizes.py",
    "tests/ppexec/workers/",
    "tests/ppsim/advice/",
    "tests/ppsim/cli/test_examples.py",
    "tests/ppsim/cli/test_explore_command.py",
    "tests/ppsim/cli/test_offload_flags.py::test_a_search",
    "tests/ppsim/export/test_cell_numbers.py",
    "tests/ppsim/export/test_figure_file.py",
    "tests/ppsim/cli/test_main.py::test_a_network_file_is_the_network_that_flags_spell",
    "tests/ppsim/cli/test_flags.py::test_any_words_give_an_answer_or_one_message",
    "tests/ppsim/estimate/test_estimate.py::test_costs_are_partitioned_simulated_and_searched",
    "tests/ppsim/explain/test_attribution_options.py",
    "tests/ppsim/explorer/test_page.py",
    "tests/ppsim/runs/test_kineto.py",
    "tests/ppsim/order_search/",
    "tests/ppsim/parameter_sweep/",
    "tests/ppsim/test_conditions.py::test_every_option_is_drawn",
    "tests/ppsim/test_kernel_cache.py",
    "tests/ppsim/variation/test_jitter_fit.py",
    "tests/studies/",
    "tests/test_readme.py::test_commands_for_gpus",
    "tests/test_readme.py::test_commands_run",
    "tests/test_readme.py::test_the_executor",
)


def pytest_configure(config: pytest.Config) -> None:
    """Take few examples where the fast tests alone are wanted and no profile is."""
    if config.getoption("markexpr") == "fast" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sample what is marked so; mark as `fast` what neither uses the pool of workers nor is slow."""
    takes_all = settings().max_examples >= settings.get_profile("thorough").max_examples or any(
        "::" in word for word in config.args
    )
    kept = items if takes_all else [item for item in items if _is_sampled(item)]
    if config.getoption("markexpr") == "fast" and not takes_all:
        kept = _thinned(kept)
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
    for item in items:
        if "pool" not in getattr(item, "fixturenames", ()) and not item.nodeid.startswith(_SLOW):
            item.add_marker(pytest.mark.fast)


def _is_sampled(item: pytest.Item) -> bool:
    """Whether an entry is among those kept, by a number made from its name: the same on every machine."""
    mark = item.get_closest_marker("one_in")
    return mark is None or zlib.crc32(item.nodeid.encode()) % mark.args[0] == 0


def _thinned(items: list[pytest.Item]) -> list[pytest.Item]:
    """Every third entry of each parametrized test, and its first: entries of one test run much the same lines."""
    counts: Counter[str] = Counter()
    kept = []
    for item in items:
        name, _, entry = item.nodeid.partition("[")
        if not entry or counts[name] % 3 == 0:
            kept.append(item)
        counts[name] += 1
    return kept


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole test session: the first costs seconds, every further run a tenth of one."""
    from ppexec import WorkerPool

    with WorkerPool() as workers:
        yield workers
