"""Worker: what a process does around a step."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ppexec.machine import quiet
from ppexec.models.batch import Batch
from ppexec.workers.worker import Worker


def test_no_rank_collects_garbage_while_another_is_still_in_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cause of a bug: a rank that was done collected for a tenth of a second, on a core that the others needed."""
    events: list[str] = []
    monkeypatch.setattr(quiet, "meet", lambda mesh: events.append("meet"))
    monkeypatch.setattr(gc, "collect", lambda: events.append("collect"))
    rank = cast(Any, SimpleNamespace(load=lambda step: Batch(step=step), clear=lambda: None, mesh=None))
    for batch in Worker.undisturbed_batches(rank, 3, 2):
        assert not gc.isenabled()
        events.append(f"step {batch.step}")
    assert events == ["collect", "meet", "step 3", "meet", "collect", "meet", "step 4", "meet"]
    assert gc.isenabled()
