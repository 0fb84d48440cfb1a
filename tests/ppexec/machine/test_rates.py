"""Measured rates make a device; what they are is the machine's business."""

from __future__ import annotations

import pytest
import torch

from ppexec.machine.rates import measure_device
from ppsim import Transformer, estimate_costs

_SMALL = {"size": 64, "copied_bytes": 2**16, "repeats": 3}


def test_rates_make_a_device_that_estimates() -> None:
    before = torch.get_num_threads()
    device = measure_device(threads=1, dtype=torch.float64, **_SMALL)
    assert torch.get_num_threads() == before
    assert device.dtype_bytes == 8
    assert "1 thread" in device.name
    model = Transformer.gpt(layers=1, hidden=8, heads=2, vocabulary=9, positions=4)
    costs = estimate_costs(model, device, micro_batch_size=1, seq=4, dtype_bytes=8)
    assert all(cost.forward_s > 0 for cost in costs)


@pytest.mark.parametrize("name", ["threads", "size", "copied_bytes", "repeats"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        measure_device(**{**_SMALL, name: 0})
