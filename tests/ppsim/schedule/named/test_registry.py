"""What build_schedule keeps."""

import json

import numpy as np
import pytest

from ppsim import build_schedule
from ppsim.schedule.named import registry
from ppsim.schedule.named.afab import afab
from ppsim.schedule.named.one_f_one_b import one_f_one_b


def test_a_small_schedule_is_built_once() -> None:
    assert build_schedule("1f1b", ranks=2, microbatches=5) is build_schedule("1f1b", ranks=2, microbatches=5)


def test_a_kept_schedule_has_the_numbers_of_nobody_who_asked_before() -> None:
    """Cause: NumPy's 7 equals 7, so that whoever asked second would get numbers that JSON does not write."""
    build_schedule("zb-v", ranks=np.int64(3), microbatches=np.int64(7))  # type: ignore[arg-type]
    schedule = build_schedule("zb-v", ranks=3, microbatches=7)
    assert json.loads(json.dumps([schedule.microbatches, schedule.placement])) == [7, [0, 1, 2, 2, 1, 0]]


def test_a_name_that_is_given_anew_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    built = []
    for rule in (afab, one_f_one_b):
        registry.register("mine", rule)
        built.append(build_schedule("mine", ranks=2, microbatches=4))
    assert built[0].orders != built[1].orders
    assert built[1].orders == build_schedule("1f1b", ranks=2, microbatches=4).orders
