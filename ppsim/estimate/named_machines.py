"""Named machines: GPUs of known kinds with their vendors' peaks, and constants where somebody measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.device import named_device
from ppsim.estimate.machine import Machine


def _gpu(name: str, gigabytes: int, multiprocessors: int, links: float, network: float) -> Machine:
    """A machine of a device whose rates are known; `links`, `network`: GB/s one way of a device, and of a node."""
    device = named_device(name)
    return Machine(
        name=name,
        flops_per_s=device.flops_per_s,
        bytes_per_s=device.bytes_per_s,
        memory_bytes=gigabytes * 10**9,
        multiprocessors=multiprocessors,
        node_bytes_per_s=_LINK_SHARE * links * 1e9,
        network_bytes_per_s=_NETWORK_SHARE * network * 1e9,
        source=device.source,
    )


# Chosen: what collectives reach of the links' peak within a node, and of the eight adapters' across nodes.
_LINK_SHARE, _NETWORK_SHARE = 0.55, 0.5
# Memory, multiprocessors and links of the same datasheets. Adapters are the usual ones: 8 x 200 Gb/s beside A100 (DGX
# A100), and 8 x 400 Gb/s beside the others (DGX H100).
_KNOWN = {
    each.name: each
    for each in (
        _gpu("a100-40gb", 40, 108, links=300, network=200),
        _gpu("a100", 80, 108, links=300, network=200),
        _gpu("h100", 80, 132, links=450, network=400),
        _gpu("h200", 141, 132, links=450, network=400),
        _gpu("b200", 180, 148, links=900, network=400),
        _gpu("mi300x", 192, 304, links=448, network=400),
    )
}

_FITTED_SOURCE = "constants fitted to 764 measured Megatron steps on A100 (VIA-Research/vTrain, data/, MIT)"
# Beside factors of the measured layer shapes, which are left out here: presets are asked for other models.
_FITTED = {  # each constant and its spread
    "a100": {
        "product_efficiency": (0.819, 0.015),
        "product_fill": (290.0, 0.17),
        "unaligned_efficiency": (0.378, 0.039),
        "bandwidth_efficiency": (0.832, 0.036),
        "kernel_s": (1.69e-5, 0.2),
        "launch_s": (7.59e-5, 0.045),
        "host_spread": (0.0281, 0.36),
        "node_latency_s": (1.98e-4, 0.098),
        "node_bytes_per_s": (3.94e11, 0.08),
        "network_latency_s": (9.04e-5, 0.58),
        "network_bytes_per_s": (5.83e10, 0.044),
    }
}


def machine_names() -> list[str]:
    """The machines that are known here."""
    return list(_KNOWN)


@checked
def named_machine(name: str, *, devices_per_node: int | None = None, fitted: bool = True) -> Machine:
    """A machine with its vendor's peaks.

    Parameters
    ----------
    name : str
        One of `machine_names()`.
    devices_per_node : int, optional
        By default 8.
    fitted : bool
        Whether constants are as fitted, where somebody measured (A100). Otherwise, and for all others, they are chosen:
        the defaults of `Machine`, with shares of links' and adapters' peaks.

    Raises
    ------
    InputError
        If no machine has this name.

    Examples
    --------
    >>> named_machine("h200").memory_bytes
    141000000000
    """
    if name not in _KNOWN:
        raise InputError(f"unknown machine {name!r}: take {', '.join(_KNOWN)}, or fit one with ppsim fit-machine")
    known = _KNOWN[name]
    if fitted and name in _FITTED:
        constants: dict[str, Any] = {constant: value for constant, (value, _) in _FITTED[name].items()}
        spread = {constant: share for constant, (_, share) in _FITTED[name].items()}
        known = replace(known, **constants, spread=spread, source=f"{known.source}; {_FITTED_SOURCE}")
    return known if devices_per_node is None else replace(known, devices_per_node=devices_per_node)
