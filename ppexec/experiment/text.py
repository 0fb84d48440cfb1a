"""Text: an experiment's outcome as sentences and table rows, for terminals and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppexec.experiment.experiment import Outcome


def comparison_rows(outcome: Outcome) -> list[dict[str, str]]:
    """Rows of a table: step time, step with reductions if there are any, bubble fraction, memory of each rank.

    Columns: quantity, predicted, measured, quartiles (of measured times), error.
    """
    summary = outcome.summary()
    step, bubble, held = summary["step_time_s"], summary["bubble_fraction"], summary["activation_bytes"]
    whole = summary["step_with_reductions_s"]
    rows = [
        _time_row("step time", step),
        *([] if whole is None else [_time_row("step with reductions", whole)]),
        {
            "quantity": "bubble fraction",
            "predicted": f"{bubble['predicted']:.2%}",
            "measured": f"{bubble['measured']:.2%}",
            "quartiles": "",
            "error": f"{(bubble['predicted'] - bubble['measured']) * 100:+.2f} points",
        },
    ]
    for rank, (predicted, measured) in enumerate(zip(held["predicted"], held["measured"], strict=True)):
        rows.append(
            {
                "quantity": f"activations, rank {rank}",
                "predicted": _mib(predicted),
                "measured": _mib(measured),
                "quartiles": "",
                "error": "equal" if predicted == measured else f"{predicted - measured:+,} bytes",
            }
        )
    return rows


def _time_row(name: str, step: Mapping[str, Any]) -> dict[str, str]:
    return {
        "quantity": name,
        "predicted": _ms(step["predicted"]),
        "measured": _ms(step["measured_median"]),
        "quartiles": f"{step['measured_p25'] * 1e3:.2f} to {_ms(step['measured_p75'])}",
        "error": f"{step['relative_error']:+.2%}",
    }


_COLUMNS = {
    "activation_bytes": "activations",
    "receive_buffer_bytes": "receive buffers",
    "send_buffer_bytes": "unfinished sends",
    "gradient_bytes": "gradients",
    "parameter_bytes": "parameters",
    "unsharded_bytes": "whole parameters",
    "optimizer_bytes": "optimizer",
    "total_bytes": "total",
    "host_bytes": "in host memory",
}


def memory_rows(outcome: Outcome) -> list[dict[str, str]]:
    """Rows of a table: peak memory of each rank, predicted and measured, in MiB by kind, for kinds known to both."""
    held = outcome.summary()["memory"]
    sources = ("predicted", "measured")
    known = [name for name in _COLUMNS if all(name in held[source] for source in sources)]
    return [
        {"rank": str(rank), "source": source}
        | {f"{_COLUMNS[name]} (MiB)": f"{held[source][name][rank] / 2**20:.3f}" for name in known}
        for rank in range(outcome.config.ranks)
        for source in sources
    ]


def memory_verdict(outcome: Outcome) -> str:
    """Whether predicted and measured bytes are equal after every action, or where they first are not."""
    difference = outcome.summary()["memory"]["first_difference"]
    if difference is None:
        return "Bytes are equal on every rank after every action."
    where = f" after {difference['action']}" if difference["action"] else ""
    return (
        f"Bytes first differ in the {difference['column']} of rank {difference['rank']}{where}: "
        f"predicted {difference['predicted']:,}, measured {difference['measured']:,}."
    )


def verdict(outcome: Outcome) -> str:
    """What a reader should know first, in a few sentences."""
    is_equal = outcome.summary()["memory"]["equal_at_every_action"]
    memory = "equal to the byte after every action" if is_equal else "not equal"
    parts = [
        f"The predicted step is {_beside(outcome.step_time_error)} the median of {len(outcome.measured)} measured "
        f"steps. The memory held is {memory}."
    ]
    if not is_equal:
        parts.append(memory_verdict(outcome))
    verified = outcome.verified
    if verified is not None:
        what = "Outputs" if outcome.config.forward_only else "Outputs and gradients"
        if verified.first_difference is None:
            parts.append(f"{what} are bit-equal to those of one process without a pipeline.")
        elif verified.passed:
            parts.append(f"{what} equal those of one process, but for rounding: sums are taken in another order.")
        else:
            parts.append(f"Against one process without a pipeline, {verified.first_difference}.")
    cores = outcome.environment["cores"]
    is_real = outcome.profile is not None
    if is_real and outcome.config.world_size * outcome.config.threads > cores:
        efficiency = outcome.calibration.sharing_efficiency
        parts.append(
            f"{outcome.config.world_size} ranks of {outcome.config.threads} thread(s) share {cores} cores. The "
            f"prediction divides the cores evenly among the ranks, and assumes {efficiency:.2f} of their full "
            "throughput, as measured in calibration runs between the steps."
        )
    return " ".join(parts)


def _beside(error: float) -> str:
    """An error in words: "1.2% longer than"."""
    size = f"{abs(error):.1%}"
    return "as long as" if size == "0.0%" else f"{size} {'longer' if error > 0 else 'shorter'} than"


def environment_rows(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested JSON values as one level of text."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows[name] = ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None) or "as found"
        elif value is not None:
            rows[name] = str(value)
    return rows


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f} MiB"
