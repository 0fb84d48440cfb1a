"""Answers: what the page is told when it asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ppsim.palette as palette
from ppsim.errors import InputError, ScheduleError
from ppsim.explain.comparison import compare
from ppsim.explorer.picture import Document, order_picture, picture_of, usual_seconds
from ppsim.explorer.question import Question, field_of
from ppsim.explorer.runs import Runs
from ppsim.export.perfetto import perfetto_json
from ppsim.schedule.action import Kind
from ppsim.schedule.named.registry import natural_stages_per_rank, schedule_names
from ppsim.trace.trace import Trace


def choices() -> Document:
    """What the page needs before it asks for a step: the schedules and the colours."""
    return {
        "schedules": {name: natural_stages_per_rank(name) for name in schedule_names()},
        "kinds": [
            {"letter": kind.name, "name": palette.KIND_NAMES[kind], "colour": colour}
            for kind, colour in sorted(palette.KIND_COLOURS.items())
        ],
        "parts": dict(palette.PART_COLOURS),
        "critical": palette.CRITICAL,
        "beside": {
            Kind.REDUCE_GRAD.name: {"name": "gradients added up over replicas", "colour": palette.REDUCTION},
            Kind.UNSHARD.name: {"name": "parameters gathered from replicas", "colour": palette.GATHERING},
            Kind.O.name: {"name": "activations to host memory", "colour": palette.OFFLOADING},
            Kind.L.name: {"name": "activations from host memory", "colour": palette.LOADING},
        },
        "series": list(palette.SERIES_COLOURS),
    }


def step(given: Any, runs: Runs) -> Document:
    """The step that a question asks for.

    Parameters
    ----------
    given : JSON value
        A question.
    runs : Runs
        Where a run stands that the question compares with.

    Returns
    -------
    dict
        `picture` and `comparison` (in words, or None). For a schedule that cannot run `problems`, and `picture` shows
        its orders without waiting, or is None where the text holds no orders. For anything else that cannot be
        `error`, and `field`, the part of the question that is to blame, or None.
    """
    try:
        question = Question.from_dict(given)
    except InputError as error:
        return _refusal(error, None)
    try:
        review = question.review()
    except InputError as error:
        return _refusal(error, "schedule")
    try:
        stages = None if review.schedule is None else question.costs(review.schedule)
        if review.problems or review.schedule is None or stages is None:
            shown = None if review.schedule is None or stages is None else order_picture(review.schedule, stages)
            problems = [{"message": each.message, "places": each.places} for each in review.problems]
            return {"problems": problems, "picture": shown}
        trace = question.predicted(review.schedule, stages)
        return {"picture": picture_of(trace), "comparison": _comparison(trace, question.run, runs)}
    except InputError as error:
        return _refusal(error, None)


def _refusal(error: InputError, otherwise: str | None) -> Document:
    """What is wrong, and with which field: that with which the message begins, or another."""
    return {"error": str(error), "field": field_of(str(error)) or otherwise}


def run(number: str, runs: Runs) -> Document:
    """A measured run: its name, its picture, its order as a text, and what its stages usually took.

    Raises InputError for an unknown one.
    """
    name, trace = runs.get(number)
    order = trace.schedule.to_csv(messages=trace.schedule.communication is not None, sharding=True, offload=True)
    return {"run": number, "name": name, "picture": picture_of(trace), "order": order, "usual": usual_seconds(trace)}


def perfetto(given: Any, runs: Runs) -> str:
    """Steps for ui.perfetto.dev.

    Parameters
    ----------
    given : mapping from a title to a question or to the number of a run
        What the file shall hold.
    runs : Runs
        Where the runs stand.

    Raises
    ------
    InputError
        If one of them cannot be shown.
    """
    if not isinstance(given, Mapping):
        raise InputError("a file of steps needs a title for each step")
    return perfetto_json({title: _trace(asked, runs) for title, asked in given.items()})


def _trace(asked: Any, runs: Runs) -> Trace:
    if isinstance(asked, str):
        return runs.get(asked)[1]
    question = Question.from_dict(asked)
    review = question.review()
    if review.problems or review.schedule is None:
        raise ScheduleError(f"{review.problems[0].message}: mend the schedule first")
    return question.predicted(review.schedule, question.costs(review.schedule))


def _comparison(trace: Trace, number: str | None, runs: Runs) -> str | None:
    """What makes a measured run of the same orders longer or shorter; None where there is none."""
    if number is None:
        return None
    try:
        measured = runs.get(number)[1]
    except InputError:  # the page is told where it asks for the run itself
        return None
    if measured.schedule.orders != trace.schedule.orders or measured.schedule.placement != trace.schedule.placement:
        return None
    return compare(trace, measured).explain()
