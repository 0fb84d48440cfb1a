"""Remote: a function run on every rank of a real world."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppexec import RunConfig, Session, WorkerPool
from tests.support.factories import spelled


def tiny(**changes: Any) -> RunConfig:
    """The smallest run of two ranks; seconds after which a lost message is an error, not minutes."""
    values = {"layers": 4, "hidden": 8, "seq": 2, "micro_batch_size": 1, "ranks": 2, "microbatches": 4}
    return RunConfig(**{**values, "threads": 1, "warmup": 0, "steps": 1, "timeout_s": 60, **changes})


def on_every_rank(pool: WorkerPool, ranks: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """Call a module's function with JSON arguments in each of `ranks` processes of one world; the results by rank."""
    with tempfile.TemporaryDirectory() as directory:
        where = f"{function.__module__}:{function.__qualname__}"
        model = spelled("calling", function=where, directory=directory, arguments=arguments)
        config = tiny(model=model, ranks=ranks, layers=ranks, microbatches=2 * ranks)
        with Session(config, pool=pool):
            return [pickle.loads(Path(directory, f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
