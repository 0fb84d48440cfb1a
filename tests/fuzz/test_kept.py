"""Kept inputs: what fuzzing found, and inputs near good ones, are values or InputErrors, without atheris."""

from __future__ import annotations

import contextlib
import random
import re
import time
import warnings

import pytest

from ppsim.errors import InputError
from tests.fuzz.targets import KEPT, TARGETS

_WORDS = b'-1 1e308 NaN Infinity null [] {} true "" 1e400 0 2147483648 1.5 [[1]] "x" 9007199254740993 "\\ud800"'.split()
_WORDS += [
    b"9" * 30,
    b"9" * 5000,
    b"\0",
    b"\xff",
    b",",
    b"\n",
    b";",
    b"REDUCE_GRAD",
    b"1SEND_F0",
    b"(0F0;0B0)OVERLAP_F_B",
]
_VALUE = re.compile(rb'-?[0-9.]+(?:e-?\d+)?|"[^"]*"|\[[^\]]*\]|true|false|null')


def near(seeds: list[bytes], count: int) -> list[bytes]:
    """Seeds with some values, bytes or pieces exchanged; the same every time."""
    dice, found = random.Random(0), []
    for _ in range(count):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice([1, 1, 2, 4])):
            spans = [match.span() for match in _VALUE.finditer(data)]
            begin = dice.randrange(len(data) + 1)
            end = min(begin + dice.choice([0, 1, 3, 8]), len(data))
            if spans and dice.random() < 0.6:
                begin, end = dice.choice(spans)
            data[begin:end] = dice.choice([*_WORDS, b"", bytes([dice.randrange(256)])])
        found.append(bytes(data))
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_values_or_input_errors(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        with contextlib.suppress(InputError) if name == "layout" else contextlib.nullcontext():
            target.read(seed)
    kept = sorted((KEPT / name).glob("*"))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in [path.read_bytes() for path in kept] + near(seeds, 100):
            began = time.perf_counter()
            try:
                target.read(data)
            except InputError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{data[:300]!r} raised {type(error).__name__}: {error}") from error
            assert time.perf_counter() - began < 20, data[:300]  # 2 s for the fuzzer, on a machine of its own
    assert refused > 30
