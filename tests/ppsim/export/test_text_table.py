"""Tables as text: aligned, with every row's columns."""

from __future__ import annotations

from ppsim.export.text_table import text_table


def test_amounts_stand_right_and_words_left() -> None:
    rows = [
        {"schedule": "afab", "step": "12.30 ms", "share": 0.123456, "bytes": 201326592, "equal": True},
        {"schedule": "zb-h1", "step": "9.5 ms", "share": 12345.6, "equal": False, "note": "x"},
    ]
    assert text_table(rows) == (
        "schedule      step   share        bytes  equal  note\n"
        "afab      12.30 ms  0.1235  201,326,592  yes    –\n"
        "zb-h1       9.5 ms  12,346            –  no     x"
    )


def test_a_column_of_amounts_may_have_empty_cells() -> None:
    assert text_table([{"a": "1"}, {"a": ""}, {"a": "10"}]) == " a\n 1\n\n10"
