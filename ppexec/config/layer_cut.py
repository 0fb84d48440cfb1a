"""Layer cut: the number of layers of each stage, as the flags `partition` and `layout` say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ppsim
from ppsim.errors import InputError


def sizes_of_partition(
    partition: str, *, layers: int, ends: tuple[int, int], stages: int, work_s: Sequence[float] | None
) -> list[int]:
    """The layers of each stage by `partition`.

    Parameters
    ----------
    partition : str
        "even", "optimal", or sizes such as "3,2,3". Even and sizes count `layers`; optimal cuts the whole chain.
    layers : int
        Layers that the flag counts.
    ends : (int, int)
        Layers of the chain before and after those.
    stages : int
        Number of stages.
    work_s : sequence of float, shape (chain,), or None
        Seconds of each layer of the chain, for "optimal".

    Raises
    ------
    InputError
        For a cut that cannot be, with the nearest that can.
    """
    method: Any = partition
    chain = layers + sum(ends)
    if method == "optimal":
        return ppsim.partition_sizes(chain, stages=stages, method=method, work_s=work_s)
    if method != "even":
        try:
            method = [int(size) for size in partition.split(",")]
        except ValueError:
            raise InputError(f"partition must be even, optimal or sizes such as 3,2,3, got {partition!r}") from None
    fits = isinstance(method, list) and len(method) == stages and sum(method) == layers
    sizes = method if fits else ppsim.partition_sizes(layers, stages=stages, method=method)
    sizes[0] += ends[0]
    sizes[-1] += ends[1]
    return ppsim.partition_sizes(chain, stages=stages, method=sizes)


def sizes_of_layout(text: str, *, model: str, layers: int, ends: tuple[int, int], stages: int) -> list[int]:
    """The layers of each stage by Megatron's layout.

    Raises
    ------
    InputError
        For a layout of other layers than the model's, or with an empty stage.
    """
    layout = ppsim.Layout.parse(text)
    layout.check_counts(layers + sum(ends), stages)
    wanted = "E" * ends[0] + "t" * layers + "L" * ends[1]
    if "".join(layout.stages) != wanted:
        raise InputError(f"layout {text!r} has other layers than {model}: write the letters {wanted}")
    if 0 in layout.sizes:
        raise InputError(
            f"layout {text!r} leaves stage {layout.sizes.index(0)} empty, which can be simulated and not be run: "
            "give it a layer"
        )
    return layout.sizes
