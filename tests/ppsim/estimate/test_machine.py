"""Machines: kernels, collectives and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ppsim import Machine, machine_names, named_device, named_machine
from ppsim.estimate.machine import CONSTANTS

# One tile of 128 x 256 takes a second for each 2 * 128 * 256 * inner = 65536 inner FLOPs.
PLAIN = Machine(
    flops_per_s=4 * 65536.0,
    bytes_per_s=1e30,
    memory_bytes=1,
    multiprocessors=4,
    product_efficiency=1.0,
    product_fill=1.0,
    bandwidth_efficiency=1.0,
    kernel_s=1e-7,
    unaligned_efficiency=0.5,
    node_latency_s=1e-3,
    node_bytes_per_s=1e9,
    network_latency_s=2e-3,
    network_bytes_per_s=4e9,
)


@pytest.mark.parametrize(
    ("rows", "columns", "waves"),
    # By hand: 128 x 256 tiles in waves of 4, or waves of 128 x 128 tiles at 0.55 of the time.
    [(128, 128, 0.55), (512, 256, 1.0), (640, 256, 1.65), (1024, 1024, 8.0), (1152, 1024, 9.0)],
)
def test_products_take_the_waves_of_their_tiles(rows: int, columns: int, waves: float) -> None:
    assert float(PLAIN.product_s(rows, columns, 64)) == pytest.approx(waves * 65)


def test_a_filled_device_reaches_its_share_of_the_peak() -> None:
    machine = named_machine("h100")
    size = 132 * 256
    seconds = float(machine.product_s(size, size, 65536))
    assert 2 * size**2 * 65536 / seconds / machine.flops_per_s == pytest.approx(machine.product_efficiency, rel=0.01)


def test_sizes_that_are_no_multiple_of_16_bytes_are_slower() -> None:
    whole, odd = (float(PLAIN.product_s(512, columns, 63 * 8)) for columns in (256, 255))
    assert odd == pytest.approx(2 * whole)


def test_traffic_bounds_a_product_from_below() -> None:
    slow = Machine(flops_per_s=1e30, bytes_per_s=2.0, memory_bytes=1, multiprocessors=1, bandwidth_efficiency=0.5)
    assert float(slow.product_s(8, 8, 8, 3)) == pytest.approx(3 * 3 * 64 * 2)


def test_collectives_within_a_node_and_across() -> None:
    assert float(PLAIN.all_reduce_s(8e9, 1)) == 0
    assert float(PLAIN.all_reduce_s(8e9, 8)) == pytest.approx(1e-3 + 2 * 7 / 8 * 8)
    assert float(PLAIN.reduce_scatter_s(8e9, 8)) == pytest.approx(1e-3 + 7 / 8 * 8)
    # 16 ranks, each on a node of its own with 8 rings side by side: an eighth of the node's bandwidth for each.
    assert float(PLAIN.all_reduce_s(8e9, 16, 8)) == pytest.approx(2e-3 + 2 * 15 / 16 * 8 * 2)
    # One ring over two whole nodes is no faster than its devices' links.
    assert float(PLAIN.all_reduce_s(8e9, 16, 1)) == pytest.approx(2e-3 + 2 * 15 / 16 * 8)
    # Each of two nodes sends what its ranks added up once, not 15/8 times as one ring over all ranks would; four ranks
    # of each of two groups on four nodes share them likewise.
    thin = replace(PLAIN, network_bytes_per_s=4e8)
    assert float(thin.all_reduce_s(8e9, 16, 1)) == pytest.approx(2e-3 + 8 / 0.4)
    assert float(thin.all_reduce_s(8e9, 16, 2)) == pytest.approx(2e-3 + 2 * 3 / 4 * 8 / 0.2)
    occupied, latency = PLAIN.message_s(np.array([1e9, 1e9]), np.array([False, True]))
    assert occupied.tolist() == [1.0, 2.0]
    assert latency.tolist() == [5e-4, 2e-3]


def test_hosts_of_more_ranks_take_longer() -> None:
    machine = Machine(flops_per_s=1, bytes_per_s=1, memory_bytes=1, multiprocessors=1, launch_s=1e-4, host_spread=0.1)
    assert machine.host_s(10, np.array([1, 2, 4])).tolist() == pytest.approx([1e-3, 1.1e-3, 1.3e-3])


def test_files_come_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = replace(named_machine("a100"), layer_factors={"blocks: of some shape": 0.9})
    machine.save(path, fit={"steps": 3})
    assert Machine.from_file(path) == machine
    assert json.loads(path.read_text())["fit"] == {"steps": 3}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a JSON object"),
        ({"schema": "other"}, "must be a JSON object with"),
        ({"speed": 1}, "unknown field 'speed'; known are flops_per_s"),
        ({"bytes_per_s": None}, "bytes_per_s must be a number"),
        ({"product_efficiency": 1.5}, r"product_efficiency must be from 0\.1 to 1, got 1\.5"),
        ({"spread": {"mass": 1.0}}, "spread names 'mass', which is no constant"),
        ({"spread": {"launch_s": -1.0}}, "spread of launch_s must be finite"),
        ({"layer_factors": {"blocks": 0.0}}, r"layer_factors of 'blocks' must be finite and > 0, got 0\.0"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, document: object, message: str) -> None:
    path = tmp_path / "machine.json"
    whole = {"schema": "ppsim machine 1", "flops_per_s": 1, "bytes_per_s": 1, "memory_bytes": 1, "multiprocessors": 1}
    path.write_text(json.dumps(whole | document if isinstance(document, dict) else document))
    with pytest.raises(ValueError, match=message) as error:
        Machine.from_file(path)
    assert str(path) in str(error.value)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text('{"schema": "ppsim machine 1", "flops_per_s": 1}')
    with pytest.raises(ValueError, match="bytes_per_s is missing"):
        Machine.from_file(path)


@pytest.mark.parametrize("name", machine_names())
def test_known_machines_say_where_their_rates_are_from(name: str) -> None:
    machine = named_machine(name, devices_per_node=4)
    assert "datasheet" in machine.source
    assert machine.devices_per_node == 4
    assert 100 < machine.flops_per_s / machine.bytes_per_s < 400  # FLOPs per byte, as all of these have
    assert set(machine.spread) <= set(CONSTANTS)


@pytest.mark.parametrize(("field", "value"), [("flops_per_s", 0), ("flops_per_s", math.inf), ("memory_bytes", 0)])
def test_numbers_without_meaning_are_refused(field: str, value: float) -> None:
    whole = {"flops_per_s": 1.0, "bytes_per_s": 1.0, "memory_bytes": 1, "multiprocessors": 1}
    with pytest.raises(ValueError, match=f"{field} must be"):
        Machine(**{**whole, field: value})


@pytest.mark.parametrize("name", machine_names())
def test_machines_have_their_devices_rates(name: str) -> None:
    """Cause of a bug: a second table of vendors' peaks."""
    machine, device = named_machine(name), named_device(name)
    assert (machine.flops_per_s, machine.bytes_per_s) == (device.flops_per_s, device.bytes_per_s)
    assert machine.source.startswith(device.source)


def test_unknown_machines_are_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"unknown machine 'tpu': take a100-40gb, .*or fit one"):
        named_machine("tpu")
