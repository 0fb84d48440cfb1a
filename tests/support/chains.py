"""Chains: random models whose layers differ in kind, shape and dtype, and random runs of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import ppsim
from ppexec import Model, RunConfig
from ppsim import Schedule
from tests.support.factories import chain, spelled
from tests.support.remote import tiny
from tests.support.strategies import schedules


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The arguments of `factories.chain`; `layers` as JSON so that the value is frozen."""

    shape: tuple[int, ...]
    integers: bool
    layers: str

    @property
    def length(self) -> int:
        return len(json.loads(self.layers))

    @property
    def arguments(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "integers": self.integers, "layers": json.loads(self.layers)}

    @property
    def name(self) -> str:
        """For `--model`."""
        return spelled("chain", **self.arguments)

    def build(self, seed: int = 0) -> Model:
        return chain(RunConfig(seed=seed), **self.arguments)


_KEEP_INPUT = ["norm", "residual", "thrice"]  # for their weights' gradients
_KEEP_WIDTH = [*_KEEP_INPUT, "attention", "shift", "frozen", "scaled"]
_FREE = ["relu_", "mask", "gelu"]  # no parameters; what they save is not their input
# For bytes alone: layouts and random numbers that depend on the cut, and state kept from one microbatch to the next.
_ODD = ["skip", "spread", "turned", "table", "remembers", "dropout", "dropout_", "scaled", "half"]
_IN_PLACE = ["relu_", "dropout_"]
_SAVE_NO_OUTPUT = ["linear", "norm", "residual", "shift", "frozen", "cast", "scaled"]  # autograd allows in place after


@st.composite
def chains(draw: st.DrawFn, *, length: int | None = None, keep_inputs: bool = False, odd: bool = False) -> Chain:
    """A chain that fits together and has a parameter to train: perhaps integers in, last position, flattened.

    keep_inputs: of layers that save their input for the backward alone. odd: layers for which bytes alone can be
    compared.
    """
    length = length or draw(st.integers(1, 7))
    batch, seq, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    integers = draw(st.booleans())
    layers: list[list[Any]] = [["embedding", width, dtype] if integers else ["linear", width, width, dtype]]
    shape = (batch, seq) if integers else (batch, seq, width)
    flat = False
    while len(layers) < length:
        kinds = (
            ["linear", *_KEEP_INPUT]
            if keep_inputs
            else ["linear", "tanh", "identity", "cast", *_FREE, *_KEEP_WIDTH[:-1]]
        )
        if odd:
            kinds += _ODD
        if layers[-1][0] not in _SAVE_NO_OUTPUT:
            kinds = [kind for kind in kinds if kind not in _IN_PLACE]
        if flat:
            # Without a batch, attention uses its input three times, and the residual a fourth: a backward in two
            # halves adds those four in another order.
            kinds = [kind for kind in kinds if kind != "attention"]
        kind = draw(st.sampled_from(kinds if flat or keep_inputs else [*kinds, "last", "flatten"]))
        if kind == "linear":
            new = draw(st.integers(2, 6))
            layers.append([kind, width, new, dtype])
            width = new
            continue
        if kind == "cast":
            dtype = "float64" if dtype == "float32" else "float32"
        layers.append([kind, *([width] if kind in _KEEP_WIDTH else []), dtype])
        if kind == "last":
            seq = 1
        elif kind == "flatten":
            width, flat = width * seq, True
    return Chain(shape=shape, integers=integers, layers=json.dumps(layers))


@st.composite
def named_schedules(draw: st.DrawFn, *, max_ranks: int = 4, max_microbatches: int = 6) -> Schedule:
    """A schedule by name, with numbers that it allows."""
    name = draw(st.sampled_from(ppsim.schedule_names()))
    ranks, microbatches = draw(st.integers(1, max_ranks)), draw(st.integers(1, max_microbatches))
    try:
        return ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches)
    except ValueError:
        return ppsim.build_schedule("afab", ranks=ranks, microbatches=microbatches)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to be: the configuration's values, and the schedule as CSV where it has no name."""

    values: dict[str, Any]
    csv: str = ""

    def config(self, directory: Path) -> RunConfig:
        """The configuration; a schedule of its own goes by a file."""
        if not self.csv:
            return tiny(**self.values)
        path = directory / f"{hash(self.csv) & 0xFFFFFFFF:x}.csv"
        path.write_text(self.csv, encoding="utf-8")
        return tiny(**self.values, from_csv=path)


@st.composite
def cases(draw: st.DrawFn, *, keep_inputs: bool = False, odd: bool = False, recompute: bool = True) -> Case:
    """The built-in model or a random chain, cut unevenly, under a schedule by name or any valid order."""
    by_name = draw(st.booleans())
    schedule = draw(named_schedules()) if by_name else draw(schedules(max_microbatches=6, recompute=recompute))
    sizes = draw(st.lists(st.integers(1, 3), min_size=schedule.model_stages, max_size=schedule.model_stages))
    values: dict[str, Any] = {
        "layers": sum(sizes),
        "partition": ",".join(map(str, sizes)),
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "seed": draw(st.integers(0, 2**32)),
    }
    if by_name:
        values["schedule"] = schedule.name
    if odd or draw(st.booleans()):
        values["model"] = draw(chains(length=sum(sizes), keep_inputs=keep_inputs, odd=odd)).name
    else:
        values["hidden"] = draw(st.integers(1, 12))
        values["intermediate"] = draw(st.integers(1, 20))
        values["seq"] = draw(st.integers(1, 4))
        values["micro_batch_size"] = draw(st.integers(1, 3))
        values["dtype"] = draw(st.sampled_from(["float32", "float64"]))
    return Case(values=values, csv="" if by_name else schedule.to_csv())
