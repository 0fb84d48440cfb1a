"""Public runs: what others measured against what is predicted, from files in the project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ppsim
from ppsim import Execution, LayerCost, Transformer
from ppsim.estimate.layer_work import transformer_work
from ppsim.estimate.named_machines import named_machine
from ppsim.files import read_json
from ppsim.planning.machine_fit import fit_machine
from ppsim.planning.measured_steps import MeasuredStep
from ppsim.planning.step_table import predict_steps
from ppsim.planning.training_step import TrainingStep
from ppsim.runs.run_costs import DISTURBED
from ppsim.trace.trace import known

_WARM_UP = 2  # iterations of the published run, in which memory still grows


@dataclass(frozen=True, kw_only=True)
class PublicRow:
    """One published figure and its prediction.

    Parameters
    ----------
    source, what : str
        Whose figure, and of what.
    unit : str
        "s" or "GiB".
    published, predicted : float
        In that unit.
    from_what : str
        What the prediction was made from.
    """

    source: str
    what: str
    unit: str
    published: float
    predicted: float
    from_what: str

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "error": self.error}


def public_rows(directory: Path) -> Iterator[PublicRow]:
    """Predict every figure.

    Parameters
    ----------
    directory : Path
        Holds primus_pp8/, megatron_2022.json and deepseek_pair.json.
    """
    yield from _primus_rows(directory / "primus_pp8")
    megatron = read_json(directory / "megatron_2022.json")
    yield from _megatron_memory_rows(megatron)
    yield from _megatron_time_rows(megatron)
    yield _deepseek_row(read_json(directory / "deepseek_pair.json"))


def _primus_rows(path: Path) -> Iterator[PublicRow]:
    run, source = ppsim.read_run(path), "Primus, 1F1B on 8 GPUs"
    every = ppsim.costs_of(run)
    usual_s = run.median.makespan_s
    for step, trace in zip(run.steps[_WARM_UP:], run.traces[_WARM_UP:], strict=True):
        disturbed = " (disturbed)" if trace.makespan_s > (1 + DISTURBED) * usual_s else ""
        own = every.predict(durations_s=trace.end_s - trace.start_s)
        others = ppsim.costs_of(run.only([each for each in run.steps if each != step])).predict()
        for predicted, from_what in ((own, "its own durations"), (others, "the other steps")):
            yield PublicRow(
                source=source,
                what=f"step {step}{disturbed}",
                unit="s",
                published=trace.makespan_s,
                predicted=predicted.makespan_s,
                from_what=from_what,
            )
    held = known(every.predict().memory.total_bytes)
    most = np.max([known(trace.total_peak_bytes) for trace in run.traces], axis=0)
    for rank in range(run.ranks):
        yield PublicRow(
            source=source,
            what=f"memory of rank {rank}",
            unit="GiB",
            published=most[rank] / 2**30,
            predicted=held[rank] / 2**30,
            from_what="a line over the ranks" if 0 < rank < run.ranks - 1 else "a line, and what is its own",
        )


def _megatron_memory_rows(table: dict[str, Any]) -> Iterator[PublicRow]:
    """Activations of the first rank, from shapes alone; stages free what they have sent."""
    for name, shape in table["configurations"].items():
        stages = shape["pp"] * shape["stages_per_rank"]
        microbatches = shape["global_batch"] // shape["micro_batch_size"]
        schedule = ppsim.build_schedule(
            "interleaved-1f1b" if shape["stages_per_rank"] > 1 else "1f1b",
            ranks=shape["pp"],
            microbatches=microbatches,
            stages_per_rank=shape["stages_per_rank"],
        )
        for way, published in table["activation_gib"][name].items():
            execution = Execution(
                micro_batch_size=shape["micro_batch_size"],
                seq=table["seq"],
                tp=table["tp"],
                split_vocabulary=True,
                attention="unfused",
                dropout=True,
                recompute=way,
                sequence_parallel=way == "selective",
            )
            layers = [
                LayerCost(
                    name=work.name,
                    forward_s=1.0,
                    backward_input_s=1.0,
                    backward_weight_s=1.0,
                    activation_bytes=work.activation_bytes,
                    output_bytes=work.output_bytes,
                )
                for work in transformer_work(_gpt(table, shape), execution)
            ]
            sizes = [shape["layers"] // stages] * stages
            sizes[0] += 1
            sizes[-1] += 1
            costs = ppsim.partition(layers, stages=stages, method=sizes, frees_outputs=True)
            held = known(ppsim.simulate(schedule, costs, engine="compiled").peak_activation_bytes)
            recomputed = "" if way == "none" else ", sequence parallel, selective recomputation"
            yield PublicRow(
                source="Megatron-LM 2022",
                what=f"{name} activations{recomputed}",
                unit="GiB",
                published=published,
                predicted=held[0] / 2**30,
                from_what="shapes",
            )


def _megatron_time_rows(table: dict[str, Any]) -> Iterator[PublicRow]:
    """Each model size from a machine fitted to the others."""
    measured = {
        (name, way): MeasuredStep(step=_megatron_step(table, shape, way), seconds=seconds, place=f"{name}, {way}")
        for name, shape in table["configurations"].items()
        for way, seconds in table["step_s"][name].items()
    }
    start = named_machine("a100", fitted=False)
    for name in table["configurations"]:
        fitted = fit_machine([each for (other, _), each in measured.items() if other != name], start)
        for way, published in table["step_s"][name].items():
            predicted = predict_steps([measured[name, way].step], fitted.machine)
            yield PublicRow(
                source="Megatron-LM 2022",
                what=f"{name} step, {way} recomputation",
                unit="s",
                published=published,
                predicted=float(predicted.step[0]),
                from_what="shapes, and a machine fitted to the other sizes",
            )


def _megatron_step(table: dict[str, Any], shape: dict[str, Any], way: Any) -> TrainingStep:
    return TrainingStep(
        model=_gpt(table, shape),
        seq=table["seq"],
        micro_batch_size=shape["micro_batch_size"],
        microbatches=shape["global_batch"] // shape["micro_batch_size"],
        tp=table["tp"],
        pp=shape["pp"],
        schedule="interleaved-1f1b" if shape["stages_per_rank"] > 1 else "1f1b",
        stages_per_rank=shape["stages_per_rank"],
        recompute=way,
        attention="unfused",
        dropout=True,
        sequence_parallel=way == "selective",
        softmax_multiple=4,
        float32_loss=True,
    )


def _gpt(table: dict[str, Any], shape: dict[str, Any]) -> Transformer:
    return Transformer.gpt(
        layers=shape["layers"],
        hidden=shape["hidden"],
        heads=shape["heads"],
        vocabulary=table["vocabulary"],
        positions=table["seq"],
    )


def _deepseek_row(pair: dict[str, Any]) -> PublicRow:
    """One overlapped pair of a stage that states its compute and its communication."""
    cost = ppsim.StageCost(
        forward_s=pair["forward_compute_ms"] / 1e3,
        forward_communication_s=pair["forward_communication_ms"] / 1e3,
        backward_input_s=0.0,
        backward_weight_s=0.0,
        backward_s=pair["backward_compute_ms"] / 1e3,
        backward_communication_s=pair["backward_communication_ms"] / 1e3,
    )
    step = ppsim.simulate(ppsim.Schedule.of([["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"]]), [cost])
    return PublicRow(
        source="DeepSeek, overlapped pair",
        what="one pair of 4 layers",
        unit="s",
        published=pair["pair_ms"] / 1e3,
        predicted=float(step.end_s[2] - step.start_s[1]),  # rows: F0, the pair's F1 and B0, B1
        from_what="compute and communication of its parts",
    )
