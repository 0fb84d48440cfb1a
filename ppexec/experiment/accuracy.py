"""Accuracy: how far off predictions were, beside how far the machine's own steps are from one another.

A row is one configuration as JSON values: group, schedule, ranks, microbatches, size; predicted_s, measured_s,
relative_error, spread (between the quartiles of its steps, over their median), disturbed_steps, and
bytes_equal_at_every_action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TARGETS = {"timed": (0.005, 0.015), "real": (0.03, 0.06), "shared-cores": (0.08, 0.15)}
"""Group -> median and worst error wanted, relative; for "real", or the machine's own spread where that is larger."""


def table(rows: Sequence[dict[str, Any]], groups: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group and each number of ranks in it: absolute relative errors, beside the machine's spread."""
    found = []
    for group in groups:
        of_group = [entry for entry in rows if entry["group"] == group]
        for ranks in (None, *sorted({entry["ranks"] for entry in of_group})):
            chosen = [entry for entry in of_group if ranks in (None, entry["ranks"])]
            if chosen:
                found.append(_group_row(group, ranks, chosen))
    return found


def _group_row(group: str, ranks: int | None, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = np.abs([entry["relative_error"] for entry in rows])
    spreads = np.array([entry["spread"] for entry in rows])
    worst = rows[int(errors.argmax())]
    target_median, target_worst = TARGETS[group]
    allowed = 1.0 if group == "real" else 0.0
    return {
        "group": group,
        "ranks": ranks,
        "n": len(rows),
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "worst": float(errors.max()),
        "median_signed": float(np.median([entry["relative_error"] for entry in rows])),
        "worst_schedule": worst["schedule"],
        "spread": float(np.median(spreads)),
        "worst_spread": float(spreads.max()),
        "within_target": bool(
            np.median(errors) <= max(target_median, allowed * np.median(spreads))
            and (errors <= np.maximum(target_worst, allowed * spreads)).all()
        ),
        "target_median": target_median,
        "target_worst": target_worst,
        "disturbed_steps": sum(entry["disturbed_steps"] for entry in rows),
        "bytes_equal_everywhere": all(entry["bytes_equal_at_every_action"] for entry in rows),
    }


def repeated(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each configuration that was done more than once: what stays (bias), and what varies between the times."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in rows:
        key = tuple(entry[name] for name in ("group", "schedule", "ranks", "microbatches", "size"))
        alike.setdefault(key, []).append(entry)
    found = []
    for (group, schedule, ranks, microbatches, size), times in alike.items():
        if len(times) < 2:
            continue
        measured, predicted, errors = (
            np.array([entry[name] for entry in times]) for name in ("measured_s", "predicted_s", "relative_error")
        )
        found.append(
            {
                "group": group,
                "schedule": schedule,
                "ranks": ranks,
                "microbatches": microbatches,
                "size": size,
                "times": len(times),
                "bias": float(errors.mean()),
                "bias_standard_error": float(errors.std(ddof=1) / len(times) ** 0.5),
                "error_deviation": float(errors.std(ddof=1)),
                "measured_deviation": float(measured.std(ddof=1) / measured.mean()),
                "predicted_deviation": float(predicted.std(ddof=1) / predicted.mean()),
            }
        )
    return found


def repeated_text(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The same as a person reads it."""
    return [
        {
            **{name: str(entry[name]) for name in ("group", "schedule", "ranks", "microbatches", "size", "times")},
            "error": f"{entry['bias']:+.2%} +- {entry['bias_standard_error']:.2%}",
            "varies by": f"{entry['error_deviation']:.2%}",
            "measured by": f"{entry['measured_deviation']:.2%}",
            "predicted by": f"{entry['predicted_deviation']:.2%}",
        }
        for entry in found
    ]


def text_rows(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table as a person reads it."""
    return [
        {
            "compute": entry["group"],
            "ranks": "all" if entry["ranks"] is None else str(entry["ranks"]),
            "n": str(entry["n"]),
            "median": f"{entry['median']:.2%}",
            "p90": f"{entry['p90']:.2%}",
            "worst": f"{entry['worst']:.2%}",
            "worst is": entry["worst_schedule"],
            "wanted": f"{100 * entry['target_median']:g}/{100 * entry['target_worst']:g} %",
            "spread": f"{entry['spread']:.2%}",
            "disturbed": str(entry["disturbed_steps"]),
            "bytes": "equal" if entry["bytes_equal_everywhere"] else "DIFFERENT",
        }
        for entry in groups
    ]
