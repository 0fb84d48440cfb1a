"""Measured steps: a table of step times of real runs, and the steps that its rows describe."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, checked, shown
from ppsim.errors import InputError
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Recompute
from ppsim.files import read_text
from ppsim.planning.step_memory import step_memory
from ppsim.planning.training_step import TrainingStep

# What a column may be called; other columns are left alone. The second names are vTrain's.
_COLUMNS = {
    "global_batch": ("global_batch", "global batch"),
    "micro_batch_size": ("micro_batch_size", "micro batch"),
    "hidden": ("hidden", "hidden size"),
    "heads": ("heads", "attention heads"),
    "layers": ("layers", "# layers"),
    "seq": ("seq", "sequence length"),
    "tp": ("tp", "tensor parallelism"),
    "dp": ("dp", "data parallelism"),
    "pp": ("pp", "pipeline parallelism"),
}
_TIMES = {"step_s": 1.0, "step_ms": 1e-3, "iteration time (ms)": 1e-3, "iteration time (s)": 1.0}
_RECOMPUTE = ("none", "selective", "full")
Style = Literal["megatron", "plain"]
# Megatron-LM as of 2022: unfused attention whose softmax kernel takes four matrices of scores at a time, a loss in
# float32, dropout, gradients summed in 16 bits after the last backward.
_STYLES: dict[Style, dict[str, object]] = {
    "megatron": {"attention": "unfused", "dropout": True, "softmax_multiple": 4, "float32_loss": True},
    "plain": {},
}


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step, how long it took, and where that is written. Raises InputError for seconds that are not above 0."""

    step: TrainingStep
    seconds: float
    place: str

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            where = f"{self.place}: " if self.place else ""
            raise InputError(f"{where}seconds must be finite and above 0, got {self.seconds!r}")


@checked
def read_measured_steps(
    path: str | Path,
    *,
    vocabulary: int = 51_200,
    recompute: Recompute | Literal["auto"] = "auto",
    style: Style = "megatron",
    memory_bytes: int | None = None,
) -> list[MeasuredStep]:
    """Read measured steps of GPTs from a CSV file.

    Parameters
    ----------
    path : str or Path
        A header and a row for each step. Columns: global_batch, micro_batch_size, hidden, heads, layers, seq, tp, dp,
        pp and step_s (or step_ms), or as vTrain's files name them. Others are left alone.
    vocabulary : int
        Of all models.
    recompute : "none", "selective", "full" or "auto"
        What the backward computed again, where a column `recompute` does not say it. "auto" takes none if every row
        then fits `memory_bytes`, and else full for all.
    style : "megatron" or "plain"
        How layers are computed: unfused attention and a float32 loss as in Megatron-LM of 2022, or fused.
    memory_bytes : int, optional
        Of a device; needed by "auto".

    Returns
    -------
    list of MeasuredStep

    Raises
    ------
    InputError
        That names file, row, column and value. OSError if the file cannot be read.
    """
    text = read_text(path)
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}") from None
    if not rows:
        raise InputError(f"{path} is empty: give a header and a row for each step")
    header = [name.strip() for name in rows[0]]
    places = {name: _column(path, header, names) for name, names in _COLUMNS.items()}
    time_name = next((name for name in header if name in _TIMES), None)
    if time_name is None:
        raise InputError(f"{path} has no column of step times: name one step_s or step_ms")
    how = header.index("recompute") if "recompute" in header else None
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}, row {number}"
        if len(row) != len(header):
            raise InputError(f"{where} has {len(row)} cells and the header {len(header)}: give one for each column")
        values = {name: int(_above_0(int, where, header[place], row[place])) for name, place in places.items()}
        seconds = _above_0(float, where, time_name, row[header.index(time_name)]) * _TIMES[time_name]
        said = row[how].strip() if how is not None else ("none" if recompute == "auto" else recompute)
        if said not in _RECOMPUTE:
            raise InputError(f"{where}: recompute must be one of {', '.join(_RECOMPUTE)}, got {shown(said)}")
        try:
            step = _step(values, vocabulary, cast(Recompute, said), style)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        found.append(MeasuredStep(step=step, seconds=seconds, place=where))
    if not found:
        raise InputError(f"{path} has no rows: give one for each step")
    if recompute == "auto" and how is None:
        if memory_bytes is None:
            raise InputError("recompute 'auto' asks what fits: give memory_bytes, or say none or full")
        if any(step_memory(each.step).total.max() > memory_bytes for each in found):
            found = [replace(each, step=replace(each.step, recompute="full")) for each in found]
    return found


def drawn_order(count: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers below `count` in an order that the seed draws. Raises InputError for a seed below 0."""
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {shown(seed)}")
    return np.random.default_rng(seed).permutation(count)


def _step(values: Mapping[str, int], vocabulary: int, recompute: Recompute, style: Style) -> TrainingStep:
    samples = values["micro_batch_size"] * values["dp"]
    if values["global_batch"] % samples:
        raise InputError(
            f"global_batch {values['global_batch']} is no multiple of micro_batch_size x dp = {samples}: mend one"
        )
    model = Transformer.gpt(
        layers=values["layers"],
        hidden=values["hidden"],
        heads=values["heads"],
        vocabulary=vocabulary,
        positions=values["seq"],
    )
    return TrainingStep(
        model=model,
        seq=values["seq"],
        micro_batch_size=values["micro_batch_size"],
        microbatches=values["global_batch"] // samples,
        tp=values["tp"],
        dp=values["dp"],
        pp=values["pp"],
        recompute=recompute,
        **_STYLES[style],  # type: ignore[arg-type]
    )


def _column(path: str | Path, header: Sequence[str], names: Sequence[str]) -> int:
    place = next((header.index(name) for name in names if name in header), None)
    if place is None:
        raise InputError(f"{path} has no column {names[0]!r}: add it (also known as {', '.join(names[1:])})")
    return place


def _above_0(kind: type[int] | type[float], where: str, column: str, text: str) -> float:
    """A cell's number."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:  # NaN is neither
        wanted = "a whole number of 1 or more" if kind is int else "a number above 0"
        raise InputError(f"{where}: {column} must be {wanted}, got {shown(text)}")
    return value
