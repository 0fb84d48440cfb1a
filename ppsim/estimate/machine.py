"""Machine: what kernels, launches, collectives and messages take on devices of one kind, in nodes of one kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, check_names, checked, shown
from ppsim.errors import InputError
from ppsim.files import read_json, write_text

Seconds = npt.NDArray[np.float64]


class Constant(NamedTuple):
    """One constant of a machine: the range in which it has a meaning, and how far it strays from device to device.

    spread: standard deviation of the constant's logarithm between machines of one kind. Chosen: small where a vendor's
    peak bounds the constant, large where software and cabling decide.
    """

    low: float
    high: float
    spread: float
    meaning: str


CONSTANTS = {
    "product_efficiency": Constant(0.1, 1.0, 0.15, "share of the FLOPs per second that a large product reaches"),
    "product_fill": Constant(
        1, 4000, 0.3, "what filling and emptying a tile costs, in elements of the inner dimension"
    ),
    "unaligned_efficiency": Constant(0.05, 1.0, 0.4, "share of that where a dimension is no multiple of 16 bytes"),
    "bandwidth_efficiency": Constant(0.1, 1.0, 0.1, "share of the memory's bytes per second that is reached"),
    "kernel_s": Constant(1e-7, 1e-4, 0.5, "seconds that each kernel takes besides on the device"),
    "launch_s": Constant(1e-6, 1e-3, 0.5, "seconds that the host takes for each operation"),
    "host_spread": Constant(1e-3, 1.0, 0.7, "how much longer hosts take for each further tensor-parallel rank"),
    "node_latency_s": Constant(1e-6, 2e-3, 1.0, "seconds of a collective within a node, whatever its size and ranks"),
    "node_bytes_per_s": Constant(1e9, 2e12, 0.3, "bytes per second and device within a node"),
    "network_latency_s": Constant(1e-6, 2e-2, 1.0, "seconds of a collective or message across nodes besides"),
    "network_bytes_per_s": Constant(1e8, 4e12, 0.4, "bytes per second out of a node, through all its adapters"),
}
_TILES = ((128, 256, 1.0), (128, 128, 0.55))  # rows, columns, time of one beside the first's: of large GPUs' libraries
_ALIGNED_BYTES = 16  # NVIDIA, Matrix Multiplication Background User's Guide, 2023, section 3
# Dao, FlashAttention-2, 2023, section 4.1: up to 225 TFLOP/s in training on an A100, where products reach about 265.
_ATTENTION_SHARE = 0.75
_SCHEMA = "ppsim machine 1"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one kind in nodes of one kind: a vendor's rates, and constants that measurements say.

    Parameters
    ----------
    flops_per_s : float
        Peak FLOPs per second of matrix products.
    bytes_per_s : float
        Peak bytes per second of a device's memory.
    memory_bytes : int
        Bytes of a device's memory.
    multiprocessors : int
        How many tiles of a product a device computes at a time.
    devices_per_node : int
        Devices that share a node.
    dtype_bytes : int
        Bytes of an element for which `flops_per_s` holds.
    product_efficiency : float
        The share of `flops_per_s` that a large product reaches.
    product_fill : float
        What the filling and emptying of a tile costs, in elements of the product's inner dimension.
    unaligned_efficiency : float
        The share of that rate that is left where a dimension is no multiple of 16 bytes.
    bandwidth_efficiency : float
        The share of `bytes_per_s` that is reached.
    kernel_s : float
        Seconds that each kernel takes besides, on the device.
    launch_s : float
        Seconds that the host takes for each operation. A layer takes no less than its operations' launches.
    host_spread : float
        Hosts of t tensor-parallel ranks wait for the slowest: they take 1 + host_spread (t - 1) times as long.
    node_latency_s, node_bytes_per_s : float
        Of a collective within a node: fixed seconds, nearly the same for any number of devices, and bytes per second
        that each device sends.
    network_latency_s, network_bytes_per_s : float
        The same across nodes; bytes per second of a whole node, which all its devices share.
    name, source : str
        What it is, and where its peaks are from.
    spread : mapping from str to float
        By constant, its standard error as a share of it, where a fit said one.
    layer_factors : mapping from str to float
        By a name of `TrainingStep.layer_shapes`, how many times as long as the constants say layers of that shape
        take, where steps with them were measured. Layers of other shapes take what the constants say.

    Raises
    ------
    InputError
        If a number has no meaning.

    Notes
    -----
    The constants' defaults are chosen, not measured: see `fit_machine`.

    A product of (m, k) by (k, n) takes the waves of its tiles, each (k + product_fill) deep, at product_efficiency of
    the peak, or the time of its memory traffic if that is longer; of two tile sizes the faster one counts. All else
    takes the time of its traffic. The roofline of each kernel is that of Williams, Waterman and Patterson, 2009.

    Examples
    --------
    >>> import ppsim
    >>> machine = ppsim.named_machine("h100")
    >>> machine.memory_bytes, machine.devices_per_node
    (80000000000, 8)
    """

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int
    multiprocessors: int
    devices_per_node: int = 8
    dtype_bytes: int = 2
    product_efficiency: float = 0.8
    product_fill: float = 200.0
    unaligned_efficiency: float = 0.35
    bandwidth_efficiency: float = 0.8
    kernel_s: float = 5e-6
    launch_s: float = 80e-6  # as fitted to hosts of A100, as nobody measured others
    host_spread: float = 0.03
    node_latency_s: float = 1e-4
    node_bytes_per_s: float = 1.8e11
    network_latency_s: float = 1e-4
    network_bytes_per_s: float = 1e11
    name: str = ""
    source: str = ""
    spread: Mapping[str, float] = field(default_factory=dict)
    layer_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be finite and > 0, got {value!r}")
        for name in ("memory_bytes", "multiprocessors", "devices_per_node", "dtype_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        for name, constant in CONSTANTS.items():
            value = getattr(self, name)
            if not constant.low <= value <= constant.high:
                raise InputError(f"{name} must be from {constant.low:g} to {constant.high:g}, got {value!r}")
        for name, share in self.spread.items():
            if name not in CONSTANTS:
                raise InputError(f"spread names {shown(name)}, which is no constant: take {', '.join(CONSTANTS)}")
            if not (math.isfinite(share) and share >= 0):
                raise InputError(f"spread of {name} must be finite and >= 0, got {share!r}")
        for name, factor in self.layer_factors.items():
            if not (math.isfinite(factor) and factor > 0):
                raise InputError(f"layer_factors of {shown(name)} must be finite and > 0, got {factor!r}")

    @classmethod
    @checked
    def from_file(cls, path: str | Path) -> Machine:
        """A machine as `save` wrote it, JSON. Raises InputError that names file and field, OSError if unreadable."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
            raise InputError(f'{path} must be a JSON object with "schema": "{_SCHEMA}", as ppsim fit-machine writes it')
        found = {name: value for name, value in document.items() if name not in ("schema", "fit")}
        check_names(str(path), found, [each.name for each in fields(cls)])
        needed = ("flops_per_s", "bytes_per_s", "memory_bytes", "multiprocessors")
        missing = [name for name in needed if name not in found]
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing: give a number")
        try:
            return cls(**found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @checked
    def save(self, path: str | Path, *, fit: Mapping[str, Any] | None = None) -> None:
        """Write the machine as JSON; `fit` is kept beside it, for readers only. Raises OSError."""
        document = {"schema": _SCHEMA, **asdict(self), **({} if fit is None else {"fit": dict(fit)})}
        write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def product_s(self, rows: Any, columns: Any, inner: Any, count: Any = 1) -> Seconds:
        """Seconds of `count` products of (rows, inner) by (inner, columns) in one kernel; arrays of one shape."""
        waves = [
            np.ceil(np.ceil(rows / tall) * np.ceil(columns / wide) * count / self.multiprocessors) * share
            for tall, wide, share in _TILES
        ]
        tall, wide, _ = _TILES[0]
        rate = self.flops_per_s * self.product_efficiency / self.multiprocessors
        multiple = max(_ALIGNED_BYTES // self.dtype_bytes, 1)
        # Rows of a row-major product need no alignment, but the transposed products of a backward have them inside.
        is_aligned = np.all([np.asarray(size) % multiple == 0 for size in (rows, columns, inner)], axis=0)
        rates = np.where(is_aligned, rate, rate * self.unaligned_efficiency)
        computing = np.minimum(*waves) * 2 * tall * wide * (inner + self.product_fill) / rates
        elements = (rows * inner + inner * columns + rows * columns) * count
        return self.moving_s(elements * self.dtype_bytes, least_s=computing)

    def moving_s(self, traffic_bytes: Any, *, least_s: Any = 0.0) -> Seconds:
        """Seconds of a kernel that reads and writes so many bytes of the device's memory."""
        moving = traffic_bytes / (self.bytes_per_s * self.bandwidth_efficiency)
        return np.asarray(np.maximum(moving, least_s) + self.kernel_s, np.float64)

    def fused_attention_s(self, flops: Any) -> Seconds:
        """Seconds of attention as one kernel."""
        return np.asarray(flops / (self.flops_per_s * self.product_efficiency * _ATTENTION_SHARE) + self.kernel_s)

    def host_s(self, operations: Any, tp: Any) -> Seconds:
        """Seconds that hosts of `tp` ranks, which wait for each other, take for so many operations."""
        return np.asarray(operations * self.launch_s * (1 + self.host_spread * (np.asarray(tp) - 1)), np.float64)

    def all_reduce_s(self, size_bytes: Any, ranks: Any, stride: Any = 1) -> Seconds:
        """Seconds of an all-reduce.

        Parameters
        ----------
        size_bytes : array of shape (n,), or a number
            Bytes that each rank has.
        ranks : array of shape (n,), or a number
            How many ranks take part.
        stride : array of shape (n,), or a number
            How far apart neighbours are in the numbering of devices, node by node: so many groups run side by side.

        Returns
        -------
        array of shape (n,)
            0 for one rank.

        Notes
        -----
        A ring moves 2 (n - 1) / n of the bytes (Patarasuk and Yuan, 2009). Across nodes, ranks of one node add up
        first, so that only 2 (k - 1) / k of the bytes leave each of k nodes, and both go on at the same time, piece by
        piece: NCCL's trees do so (Jeaugey, Massively Scale Your Deep Learning Training with NCCL 2.4, 2019). All groups
        of a node share its adapters.
        """
        return np.asarray(2 * self._ring_s(size_bytes, ranks, stride) - self._latency_s(ranks, stride), np.float64)

    def reduce_scatter_s(self, size_bytes: Any, ranks: Any, stride: Any = 1) -> Seconds:
        """Seconds of a reduce-scatter or an all-gather of `size_bytes` in all; as `all_reduce_s`, half the way."""
        return self._ring_s(size_bytes, ranks, stride)

    def all_to_all_s(self, size_bytes: Any, ranks: Any, stride: Any = 1) -> Seconds:
        """Seconds in which each rank sends an equal share of its bytes to every rank; as `all_reduce_s`.

        What goes to ranks of the own node and what goes to others takes different links at the same time.
        """
        ranks, stride = np.asarray(ranks, np.float64), np.asarray(stride, np.float64)
        near = np.minimum(ranks, np.maximum(self.devices_per_node // stride, 1))
        own = self.network_bytes_per_s / self.devices_per_node
        within = (near - 1) / ranks * size_bytes / self.node_bytes_per_s
        across = (ranks - near) / ranks * size_bytes / own
        return np.asarray(self._latency_s(ranks, stride) + np.maximum(within, across), np.float64)

    def ring_step_s(self, size_bytes: Any, ranks: Any, stride: Any = 1) -> Seconds:
        """Seconds in which each rank passes so many bytes on around a ring, in as many messages as it has others.

        One link of the ring that crosses nodes holds all of it up.
        """
        ranks, stride = np.asarray(ranks, np.float64), np.asarray(stride, np.float64)
        occupied, latency = self.message_s(size_bytes, self._crosses(ranks, stride))
        return np.asarray(np.where(np.asarray(size_bytes) > 0, occupied + (ranks - 1) * latency, 0.0), np.float64)

    def message_s(self, size_bytes: Any, crosses: Any) -> tuple[Seconds, Seconds]:
        """Seconds for which a message between two devices occupies its link, and the latency after that."""
        own = self.network_bytes_per_s / self.devices_per_node
        occupied = np.where(crosses, size_bytes / own, size_bytes / self.node_bytes_per_s)
        return occupied, np.where(crosses, self.network_latency_s, self.node_latency_s / 2)

    def _ring_s(self, size_bytes: Any, ranks: Any, stride: Any) -> Seconds:
        """Once around a ring within each node and, at the same time, once around the nodes; with one latency."""
        ranks, stride = np.asarray(ranks, np.float64), np.asarray(stride, np.float64)
        groups = np.minimum(stride, self.devices_per_node)  # that share a node
        nodes = np.ceil(ranks * groups / self.devices_per_node)
        within = (1 - 1 / ranks) * size_bytes / self.node_bytes_per_s
        across = (1 - 1 / nodes) * size_bytes * groups / self.network_bytes_per_s
        return np.asarray(self._latency_s(ranks, stride) + np.maximum(within, across), np.float64)

    def _latency_s(self, ranks: Any, stride: Any) -> Seconds:
        own = np.where(self._crosses(ranks, stride), self.network_latency_s, self.node_latency_s)
        return np.where(np.asarray(ranks) > 1, own, 0.0)

    def _crosses(self, ranks: Any, stride: Any) -> npt.NDArray[np.bool_]:
        return np.asarray(np.asarray(ranks) * np.asarray(stride) > self.devices_per_node, np.bool_)
