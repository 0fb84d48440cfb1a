"""Layer times: the seconds of many layers at once on a machine, kernel by kernel and against the host's launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.estimate.machine import Machine, Seconds
from ppsim.estimate.work import Execution, LayerWork, Work

_PHASES = 3  # F, I, W


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Seconds of each layer, arrays of shape (layers,).

    forward, backward_input, backward_weight, backward: of F, I, W and B, communication of tensor-parallel ranks,
    context-parallel ranks and experts included. communication: of that communication alone, in F and B together.
    exchange: of the experts' alone.
    """

    forward: Seconds
    backward_input: Seconds
    backward_weight: Seconds
    backward: Seconds
    communication: Seconds
    exchange: Seconds


class LayerTable:
    """The kernels of layers as arrays, so that all are timed at once, on any machine.

    Parameters
    ----------
    layers : sequence of (LayerWork, Execution)
        The layers, and how each is computed.
    """

    def __init__(self, layers: Sequence[tuple[LayerWork, Execution]]) -> None:
        self._count = len(layers)
        self._dtype_bytes = {execution.dtype_bytes for _, execution in layers}
        kernels = _Kernels()
        host = np.zeros((len(layers), _PHASES))
        for index, (layer, _) in enumerate(layers):
            works = (layer.forward_work, layer.backward_input_work, layer.backward_weight_work)
            for phase, each in enumerate(works):
                host[index, phase] = len(each)
                for work in each:
                    kernels.add(work, index * _PHASES + phase)
            # Gradients are added to those of the microbatches before: two read, one written.
            kernels.add(Work(traffic_bytes=3 * layer.parameter_bytes), index * _PHASES + 2)
        self._kernels = kernels.arrays()
        self._tp = np.array([execution.tp for _, execution in layers], np.float64)
        reduces = [(layer.forward_reduces, layer.backward_reduces) for layer, _ in layers]
        self._reduces = np.array(reduces, np.float64).reshape(-1, 2)
        # With sequence parallelism a reduce is a reduce-scatter and an all-gather. W's inputs are gathered once more,
        # but under the products of I (Korthikanti et al., 2022, section 4.2.2).
        self._is_cut = np.array([execution.sequence_parallel for _, execution in layers])
        self._reduced = np.array([layer.reduced_bytes for layer, _ in layers], np.float64)
        self._rows = np.array([(layer.row_reduces, layer.row_bytes) for layer, _ in layers], np.float64).reshape(-1, 2)
        # A rank's copies of tokens go to the experts' ranks and back, which are so far apart as ranks share an expert.
        self._expert_ranks, self._ep = (
            np.array([getattr(execution, name) for _, execution in layers], np.float64)
            for name in ("expert_ranks", "ep")
        )
        gathers = [(layer.forward_expert_reduces, layer.backward_expert_reduces) for layer, _ in layers]
        exchanges = [(layer.forward_exchanges, layer.backward_exchanges) for layer, _ in layers]
        self._gathers, self._exchanges = (np.array(each, np.float64).reshape(-1, 2) for each in (gathers, exchanges))
        self._cp = np.array([execution.cp for _, execution in layers], np.float64)
        ring = [(layer.forward_ring_bytes, layer.backward_ring_bytes) for layer, _ in layers]
        self._ring = np.array(ring, np.float64).reshape(-1, 2)
        self._gathered = np.array([layer.expert_reduced_bytes for layer, _ in layers], np.float64)
        self._exchanged = np.array([layer.exchanged_bytes for layer, _ in layers], np.float64)
        self._host = host

    def seconds(self, machine: Machine, factors: Seconds | None = None) -> LayerSeconds:
        """All layers' seconds on a machine, times the factors, shape (layers,), if there are any.

        Raises InputError if the machine's rate is for elements of another size.
        """
        other = sorted(self._dtype_bytes - {machine.dtype_bytes})
        if other:
            raise InputError(
                f"the rate of {machine.name or 'this machine'} is for elements of {machine.dtype_bytes} bytes, and a "
                f"layer's have {other[0]}: state flops_per_s for that size, and dtype_bytes with it"
            )
        device = self._kernels.seconds(machine, self._count * _PHASES).reshape(-1, _PHASES)
        host = machine.host_s(self._host, self._tp[:, None])
        whole = machine.all_reduce_s(self._reduced, self._tp)
        half = machine.reduce_scatter_s(self._reduced, self._tp)
        communication = self._reduces * np.where(self._is_cut, 2 * half, whole)[:, None]
        communication[:, 0] += self._rows[:, 0] * machine.all_reduce_s(self._rows[:, 1], self._tp)
        exchange = self._exchanges * machine.all_to_all_s(self._exchanged, self._ep, self._expert_ranks)[:, None]
        exchange += self._gathers * 2 * machine.reduce_scatter_s(self._gathered, self._expert_ranks)[:, None]
        communication += exchange
        # What attention computes in the meantime hides passing keys and values on; the first share is there already.
        passed_s = machine.ring_step_s(self._ring, self._cp[:, None], self._tp[:, None])
        hiding_s = self._kernels.attention_s(machine, self._count * _PHASES).reshape(-1, _PHASES)[:, :2]
        communication += np.maximum(passed_s - hiding_s * ((self._cp - 1) / self._cp)[:, None], 0.0)
        # What follows a collective waits for it on every rank, so that hosts do not run ahead of it either.
        parts = np.maximum(device, host)
        backward = np.maximum(device[:, 1] + device[:, 2], host[:, 1] + host[:, 2]) + communication[:, 1]
        parts[:, :2] += communication
        found = {
            "forward": parts[:, 0],
            "backward_input": parts[:, 1],
            "backward_weight": parts[:, 2],
            "backward": backward,
            "communication": communication.sum(axis=1),
            "exchange": exchange.sum(axis=1),
        }
        if factors is not None:
            found = {name: seconds * factors for name, seconds in found.items()}
        return LayerSeconds(**found)


class _Kernels:
    """Kernels as they are collected, one list for each kind."""

    def __init__(self) -> None:
        self._products: list[tuple[int, int, int, int, int]] = []
        self._moves: list[tuple[int, int]] = []
        self._fused: list[tuple[int, int]] = []

    def add(self, work: Work, owner: int) -> None:
        """Add one operation's kernels."""
        for shape in work.products:
            self._products.append((*shape, owner))
        if work.products or not (work.flops or work.traffic_bytes):
            return
        if work.flops:
            self._fused.append((work.flops, owner))
        else:
            self._moves.append((work.traffic_bytes, owner))

    def arrays(self) -> _KernelArrays:
        """What was collected."""
        return _KernelArrays(
            products=np.array(self._products, np.float64).reshape(-1, 5).T.copy(),
            moves=np.array(self._moves, np.float64).reshape(-1, 2).T.copy(),
            fused=np.array(self._fused, np.float64).reshape(-1, 2).T.copy(),
        )


@dataclass(frozen=True, kw_only=True)
class _KernelArrays:
    """products: shape (5, n) of rows, columns, inner, count, owner; moves: bytes, owner; fused: FLOPs, owner."""

    products: npt.NDArray[np.float64]
    moves: npt.NDArray[np.float64]
    fused: npt.NDArray[np.float64]

    def attention_s(self, machine: Machine, owners: int) -> Seconds:
        """Of fused attention alone, by owner."""
        seconds = machine.fused_attention_s(self.fused[0])
        return np.bincount(self.fused[1].astype(np.int64), weights=seconds, minlength=owners).astype(np.float64)

    def seconds(self, machine: Machine, owners: int) -> Seconds:
        """By owner."""
        rows, columns, inner, count, product_owner = self.products
        found = np.zeros(owners)
        for seconds, owner in (
            (machine.product_s(rows, columns, inner, count), product_owner),
            (machine.moving_s(self.moves[0]), self.moves[1]),
        ):
            found += np.bincount(owner.astype(np.int64), weights=seconds, minlength=owners)
        return found + self.attention_s(machine, owners)
