"""Operations that layers are made of: products with weights, and what only moves memory."""

from __future__ import annotations

from typing import NamedTuple

from ppsim.estimate.work import Operation, Product, Work


class Part(NamedTuple):
    """A part of a block: its operations in forward order, and the bytes of each thing that it keeps.

    saved: from F to B, without the part's input. inputs, gradients: what W needs, inputs of its linear layers and norms
    and gradients of their outputs.
    """

    operations: tuple[Operation, ...]
    saved: dict[str, int]
    inputs: dict[str, int]
    gradients: dict[str, int]


def linear(name: str, rows: int, inputs: int, outputs: int, dtype_bytes: int) -> Operation:
    """Y = X A with X (rows, inputs): 2 m k n FLOPs in F, in I (dX = dY A^T) and in W (dA = X^T dY).

    Each reads two of X, A, Y's shapes and writes the third; the bias is left out.
    """
    return grouped_linear(name, rows, inputs, outputs, dtype_bytes, groups=1)


def grouped_linear(name: str, rows: int, inputs: int, outputs: int, dtype_bytes: int, *, groups: int) -> Operation:
    """The same for rows that are dealt evenly over matrices of their own, in one kernel."""
    used = min(groups, rows)
    traffic = (rows * inputs + used * inputs * outputs + rows * outputs) * dtype_bytes
    flops = 2 * rows * inputs * outputs
    each = -(-rows // used)

    def work(m: int, n: int, k: int) -> Work:
        return Work(flops=flops, traffic_bytes=traffic, products=(Product(m, n, k, used),))

    return Operation(
        name=name,
        forward=work(each, outputs, inputs),
        backward_input=work(each, inputs, outputs),
        backward_weight=work(inputs, outputs, each),
    )


def pointwise(name: str, forward: int, backward_input: int, dtype_bytes: int, backward_weight: int = 0) -> Operation:
    """An operation that only moves memory: so many elements read and written in F, I and W."""
    return Operation(
        name=name,
        forward=Work(traffic_bytes=forward * dtype_bytes),
        backward_input=Work(traffic_bytes=backward_input * dtype_bytes),
        backward_weight=Work(traffic_bytes=backward_weight * dtype_bytes),
    )


def norm(name: str, tokens: int, hidden: int, dtype_bytes: int) -> Operation:
    """F: x in, y out. I: x and dy in, dx out. W: x and dy in."""
    size = tokens * hidden
    return pointwise(name, 2 * size, 3 * size, dtype_bytes, 2 * size)
