"""Measure: records of all ranks become one trace whose time starts with the first action."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ppexec.measure.assemble import RankMemory, assemble_trace, with_memory
from ppexec.workers.step_record import StepRecord
from ppsim import Schedule, Trace
from ppsim.trace.trace import median_step

PROGRAM = Schedule.of([["0F0", "0B0"], ["1F0", "1B0"]]).program
BILLION = 10**9


def records(offset: int = 0) -> list[StepRecord]:
    """Rank 0: F from 5 to 6, B from 10 to 12; rank 1: F from 7 to 8, B from 8 to 9; a second or two on the way."""

    def at(*seconds: float) -> list[int]:
        return [round((offset + second) * BILLION) for second in seconds]

    first = StepRecord(start_ns=at(5, 10), end_ns=at(6, 12), sent_ns={0: at(6)[0]}, received_ns={1: at(10)[0]})
    second = StepRecord(start_ns=at(7, 8), end_ns=at(8, 9), sent_ns={1: at(9)[0]}, received_ns={0: at(7)[0]})
    return [first, second]


def trace(offset: int = 0) -> Trace:
    return assemble_trace(PROGRAM, records(offset), [64, 64])


@pytest.mark.parametrize("offset", [0, 1000, 10**9])
def test_time_starts_with_the_first_action_of_any_rank(offset: int) -> None:
    """Exact to the nanosecond however long the machine has been up: differences are taken in whole numbers."""
    measured = trace(offset)
    assert measured.start_s.tolist() == [0, 5, 2, 3]
    assert measured.end_s.tolist() == [1, 7, 3, 4]
    assert measured.clock == "measured"
    assert measured.makespan_s == 7
    assert measured.bubble_s.tolist() == [4, 5]


def test_messages_run_from_their_hand_over_to_the_end_of_their_wait() -> None:
    measured = trace()
    assert measured.message_start_s.tolist() == [1, 4]
    assert measured.message_arrival_s.tolist() == [2, 5]
    assert measured.message_left_s.tolist() == [2, 5]
    assert measured.message_bytes.tolist() == [64, 64]


def test_bytes_counted_in_another_step_are_laid_over_it() -> None:
    counted = [
        RankMemory(activation_bytes=[10, 0], buffer_bytes=[64, 0], gradient_bytes=[0, 5], parameter_bytes=5),
        RankMemory(activation_bytes=[7, 0], buffer_bytes=[0, 0], gradient_bytes=[0, 6], parameter_bytes=6),
    ]
    trained = [replace(rank, optimizer_bytes=8) for rank in counted]
    assert with_memory(trace(), trained).memory.to_dict()["optimizer_bytes"] == [8, 8]
    measured = with_memory(trace(), counted)
    assert measured.activation_bytes.tolist() == [10, 0, 7, 0]
    assert measured.receive_buffer_bytes is not None
    assert measured.receive_buffer_bytes.tolist() == [64, 0, 0, 0]
    assert measured.gradient_bytes is not None
    assert measured.gradient_bytes.tolist() == [0, 5, 0, 6]
    assert measured.parameter_bytes is not None
    assert measured.parameter_bytes.tolist() == [5, 6]
    assert measured.memory.to_dict() == {
        "activation_bytes": [10, 7],
        "receive_buffer_bytes": [64, 0],
        "send_buffer_bytes": [0, 64],
        "parameter_bytes": [5, 6],
        "gradient_bytes": [5, 6],
        "total_bytes": [79, 76],
    }
    assert measured.peak_activation_bytes.tolist() == [10, 7]
    assert np.array_equal(measured.start_s, trace().start_s)


@pytest.mark.parametrize(("lengths", "middle"), [([3], 3), ([5, 1, 9], 5), ([4, 1, 9, 2], 2)])
def test_the_median_step_is_a_step_that_ran(lengths: list[float], middle: float) -> None:
    steps = [replace(trace(), end_s=trace().start_s + length) for length in lengths]
    chosen = median_step(steps)
    assert chosen in steps
    assert chosen.makespan_s == middle + 5
