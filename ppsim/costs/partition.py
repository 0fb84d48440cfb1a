"""Partition: which consecutive layers form which stage."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from ppsim.checks import check_memory, checked
from ppsim.costs.layout import Layout
from ppsim.costs.stage_cost import LayerCost, StageCost, hand_on_cost, stage_cost
from ppsim.errors import InputError

Method = str | Sequence[int]
_LAYER_BYTES = 200  # at least, of a layer's cost


@checked
def partition(
    layers: Sequence[LayerCost],
    *,
    stages: int,
    method: Method = "even",
    layout: str | Layout | None = None,
    frees_outputs: bool = False,
) -> list[StageCost]:
    """Cut layers into stages of consecutive layers.

    Parameters
    ----------
    layers : sequence of LayerCost
        The chain of layers.
    stages : int
        Number of stages.
    method : "even", "optimal", "layout" or sequence of int
        "even" gives every stage equally many layers. "optimal" minimises the time of the longest stage, in seconds of
        F + B. "layout" cuts as `layout` says. A sequence gives the number of layers of each stage.
    layout : str or Layout, optional
        Megatron's `--pipeline-model-parallel-layout`, with a letter for each layer; see `Layout`.
    frees_outputs : bool
        Whether every stage but the last frees its output once it is sent, as Megatron-LM does. By default the runtime
        holds it until the backward ends.

    Returns
    -------
    list of StageCost
        The cost of each stage. A stage without layers takes no time. It holds what it receives and passes it on.

    Raises
    ------
    InputError
        If the layers cannot be cut so; the message names the nearest cut that works.

    Examples
    --------
    >>> from ppsim import LayerCost
    >>> small, large = (LayerCost(forward_s=t, backward_input_s=t, backward_weight_s=t) for t in (1.0, 3.0))
    >>> [stage.forward_s for stage in partition([small, small, small, large], stages=2, method="optimal")]
    [3.0, 3.0]
    >>> [stage.forward_s for stage in partition([small] * 4, stages=3, method="layout", layout="Et||tL")]
    [2.0, 0.0, 2.0]
    """
    work_s = [layer.work_s for layer in layers]
    sizes = partition_sizes(len(layers), stages=stages, method=method, work_s=work_s, layout=layout)
    costs: list[StageCost] = []
    for start, stop in bounds(sizes):
        frees = frees_outputs and len(costs) < stages - 1
        if start < stop:
            costs.append(stage_cost(tuple(layers[start:stop]), frees_output=frees))
        else:
            costs.append(hand_on_cost(costs[-1]))
    return costs


@checked
def partition_sizes(
    layers: int,
    *,
    stages: int,
    method: Method = "even",
    work_s: Sequence[float] | None = None,
    layout: str | Layout | None = None,
) -> list[int]:
    """Number of layers of each stage.

    Parameters
    ----------
    layers, stages : int
        How many there are.
    method : "even", "optimal", "layout" or sequence of int
        As in `partition`.
    work_s : sequence of float, shape (layers,), optional
        Seconds of F and B of each layer. Only "optimal" needs them.
    layout : str or Layout, optional
        As in `partition`. Only "layout" takes it, and may give a stage 0 layers.

    Returns
    -------
    list of int, shape (stages,)

    Raises
    ------
    InputError
        If the layers cannot be cut so.
    """
    if (method == "layout") != (layout is not None):
        remedy = "give layout, as in 'Et|t*2|tL'" if layout is None else "leave one out, or take the method 'layout'"
        raise InputError(f"method {method!r} with layout {layout!r}: {remedy}")
    if layout is not None:
        read = Layout.parse(layout) if isinstance(layout, str) else layout
        read.check_counts(layers, stages)
        return read.sizes
    if stages < 1 or stages > layers:
        raise InputError(f"{layers} layers cannot fill {stages} stages: take 1 to {layers} stages, or more layers")
    check_memory(f"{layers} layers", _LAYER_BYTES * layers, "take fewer layers")
    if method == "even":
        if layers % stages:
            fewer = next(n for n in range(stages, 0, -1) if layers % n == 0)
            more = next((n for n in range(stages, layers + 1) if layers % n == 0), fewer)
            below, above = layers - layers % stages, layers + stages - layers % stages
            divisors = " or ".join(str(count) for count in sorted({fewer, more}))
            raise InputError(
                f"{layers} layers do not divide evenly over {stages} stages: take {below} or {above} layers, "
                f"or {divisors} stages, or the method 'optimal', or explicit sizes"
            )
        return [layers // stages] * stages
    if method == "optimal":
        if work_s is None:
            raise InputError("an optimal partition needs the layers' costs: profile the model, or give a cost file")
        if len(work_s) != layers:
            raise InputError(f"{len(work_s)} costs for {layers} layers: give one for each")
        return _optimal_sizes(list(work_s), stages)
    if isinstance(method, str):
        raise InputError(
            f"unknown partition method {method!r}: take 'even', 'optimal' or explicit sizes such as 3,2,3, or 'layout'"
        )
    sizes = list(method)
    if len(sizes) != stages or sum(sizes) != layers or any(size < 1 for size in sizes):
        raise InputError(
            f"sizes {sizes} do not cut {layers} layers into {stages} stages: give {stages} numbers of 1 or more "
            f"that add up to {layers} (these: {len(sizes)} numbers, sum {sum(sizes)})"
        )
    return sizes


def bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """First layer and one past the last of each stage."""
    ends = list(accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _optimal_sizes(work_s: list[float], stages: int) -> list[int]:
    """The min-max cut, by dynamic programming: best[k][n] is the longest stage's time if k stages hold n layers.

    If the last of the k stages begins at layer j, the longest takes max(best[k-1][j], sum of layers j to n). The first
    term grows with j and the second falls, so bisection finds where they cross. It takes
    O(stages * layers * log layers).
    """
    count = len(work_s)
    prefix = [0.0, *accumulate(work_s)]
    if not math.isfinite(prefix[-1]):
        raise InputError("the layers' seconds add up to more than a float holds: give them in seconds")
    best = [[0.0] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[1] = prefix[:]
    for k in range(2, stages + 1):
        row = best[k - 1]
        for n in range(k, count + 1):
            total = prefix[n]
            cross = k - 1 + bisect_left(range(k - 1, n), True, key=partial(_first_part_larger, row, prefix, total))
            candidates = [j for j in (cross - 1, cross) if k - 1 <= j < n]
            value, at = min((max(row[j], total - prefix[j]), j) for j in candidates)
            best[k][n], cut[k][n] = value, at
    sizes: list[int] = []
    n = count
    for k in range(stages, 0, -1):
        start = cut[k][n]
        sizes.append(n - start)
        n = start
    return sizes[::-1]


def _first_part_larger(best: list[float], prefix: list[float], total: float, cut: int) -> bool:
    """Whether, cut there, the stages before take longer than the last one."""
    return best[cut] >= total - prefix[cut]
