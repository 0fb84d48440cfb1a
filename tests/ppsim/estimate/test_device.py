"""A device's roofline."""

from __future__ import annotations

import pytest

from ppsim import Device, device_names, named_device
from ppsim.estimate.work import Work

SLOW = Device(flops_per_s=100, bytes_per_s=10, launch_s=0.5)


def test_an_operation_takes_the_longer_of_computing_and_moving() -> None:
    assert SLOW.operation_s(Work(flops=1000, traffic_bytes=20)) == 10.5
    assert SLOW.operation_s(Work(flops=1000, traffic_bytes=200)) == 20.5
    assert SLOW.time_s([Work(flops=1000), Work(traffic_bytes=200)]) == 31.0
    assert SLOW.time_s([]) == 0


def test_shares_slow_each_rate() -> None:
    shared = Device(flops_per_s=100, bytes_per_s=10, efficiency=0.5, bandwidth_efficiency=0.25)
    assert shared.operation_s(Work(flops=1000)) == 20
    assert shared.operation_s(Work(traffic_bytes=20)) == 8


@pytest.mark.parametrize("name", device_names())
def test_known_devices_say_where_their_rates_are_from(name: str) -> None:
    device = named_device(name, efficiency=0.5, launch_s=1e-6)
    assert device.name == name
    assert "datasheet" in device.source
    assert (device.dtype_bytes, device.efficiency, device.launch_s) == (2, 0.5, 1e-6)


def test_unknown_devices_are_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"unknown device 'tpu': take v100, .*mi300x, or state"):
        named_device("tpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flops_per_s", 0),
        ("bytes_per_s", float("inf")),
        ("flops_per_s", float("nan")),
        ("efficiency", 0),
        ("bandwidth_efficiency", 1.1),
        ("launch_s", -1),
    ],
)
def test_rates_without_meaning_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*got"):
        Device(**{"flops_per_s": 1.0, "bytes_per_s": 1.0, field: value})
