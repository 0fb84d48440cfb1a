"""Settings: how many examples a property gets whose every example is a run on real processes."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# 10 by default, 220 if thorough. The pool and the directory are shared by all examples on purpose.
with_workers = settings(
    max_examples=max(settings().max_examples * 3 // 8 - 5, 10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
