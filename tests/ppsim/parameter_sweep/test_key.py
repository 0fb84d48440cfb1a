"""Keys: equal configurations have one spelling, different ones never share it, and what has none is refused."""

from __future__ import annotations

import functools
import json
import math
import pickle
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Kind, LayerCost, Link, Network, StageCost, simulate
from ppsim.parameter_sweep.grid import points_of
from ppsim.parameter_sweep.key import canonical_json, check_arguments, digest, function_name, readable
from tests.support import sweeping

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_values = st.recursive(
    _scalars | st.builds(Path, st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def _shuffled(value: Any, seed: int) -> Any:
    """The same value with every mapping's keys in another order."""
    if isinstance(value, list):
        return [_shuffled(item, seed) for item in value]
    if isinstance(value, dict):
        items = [(key, _shuffled(item, seed)) for key, item in value.items()]
        random.Random(seed).shuffle(items)
        return dict(items)
    return value


def _typed(value: Any) -> Any:
    """An independent notion of sameness: types and bits count, order of keys does not."""
    if isinstance(value, list):
        return ("list", tuple(_typed(item) for item in value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, _typed(item)) for key, item in value.items()))
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else value.hex())
    return (type(value).__name__, value)


@given(_values, st.integers())
def test_the_order_of_keys_does_not_matter(value: Any, seed: int) -> None:
    assert canonical_json(_shuffled(value, seed)) == canonical_json(value)


@given(_values, _values)
def test_two_values_share_a_spelling_only_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (canonical_json(one) == canonical_json(other)) == (_typed(one) == _typed(other))


@given(_values)
def test_it_is_json_and_reads_back(value: Any) -> None:
    text = canonical_json(value)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert _typed(readable(json.loads(text, parse_constant=refuse))) == _typed(value)
    assert canonical_json(pickle.loads(pickle.dumps(value))) == text


@given(st.dictionaries(st.text("abcé", max_size=3), _values, min_size=1, max_size=4), st.integers())
def test_a_point_has_one_spelling_however_it_is_given(point: dict[str, Any], seed: int) -> None:
    by_axes = points_of({name: [value] for name, value in _shuffled(point, seed).items()})
    assert by_axes.configuration(0) == points_of([point]).configuration(0) == canonical_json(point)


def test_numbers_that_a_function_can_tell_apart_are_apart() -> None:
    assert len({canonical_json(value) for value in (1, 1.0, True, "1", [1], None, 0.0, -0.0)}) == 8


def test_numbers_of_numpy_are_those_of_python() -> None:
    assert canonical_json([np.int64(3), np.float64(0.1), np.bool_(True)]) == canonical_json((3, 0.1, True))
    assert canonical_json(np.float64("inf")) == '{"$float":"inf"}'


def test_dataclasses_count_by_type_and_by_what_they_compare() -> None:
    stage = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    layer = LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    assert canonical_json(stage) == canonical_json(pickle.loads(pickle.dumps(stage)))
    assert canonical_json(stage) != canonical_json(layer)
    assert json.loads(canonical_json(stage))["$type"] == "ppsim.costs.stage_cost.StageCost"

    @dataclass(frozen=True)
    class Noted:
        number: int
        remark: str = field(default="", compare=False)

    assert canonical_json(Noted(1, "a")) == canonical_json(Noted(1, "b")) != canonical_json(Noted(2, "a"))


def test_networks_have_pairs_for_keys_and_no_limit_by_default() -> None:
    links = {(0, 1): Link(latency_s=1e-6), (1, 0): Link()}
    one = canonical_json(Network(latency_s=1e-5, links=links))
    assert one == canonical_json(Network(latency_s=1e-5, links=dict(reversed(links.items()))))
    between = readable(json.loads(one))["links"][0, 1]
    assert (between["latency_s"], between["bytes_per_s"]) == (1e-6, math.inf)


def test_a_mapping_cannot_pass_for_what_json_lacks() -> None:
    pretenders = [{"$float": "inf"}, {"$path": "a"}, {"$mapping": []}, {"$enum": "x"}]
    for pretender, real in zip(pretenders, [math.inf, Path("a"), {}, Kind.F], strict=True):
        assert canonical_json(pretender) != canonical_json(real)
        assert readable(json.loads(canonical_json(pretender))) == pretender


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), np.arange(3), 1j, b"x", _loop(), simulate, StageCost, 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_canonical_form_is_refused_with_its_axis(value: Any) -> None:
    for grid in ({"a": [0, value]}, [{"a": 0}, {"a": value}], {"a": [{"inner": [value]}]}):
        with pytest.raises(ValueError, match="the grid's 'a': a configuration"):
            points_of(grid)


@pytest.mark.parametrize("grid", [{"a": "abc"}, {"a": 3}, {"a": {"b": 1}}, 3, "abc", [3], {1: [2]}, [{1: 2}]])
def test_what_is_no_grid_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"grid|a sequence of values"):
        points_of(grid)


def test_names_of_functions_are_where_they_are_imported_from() -> None:
    assert function_name(sweeping.square, why="a store") == "tests.support.sweeping.square"
    assert function_name(simulate, why="a store") == "ppsim.simulation.simulate.simulate"


def test_functions_without_such_a_name_are_refused_with_a_remedy() -> None:
    def inner(a: int) -> int:
        return a

    for function in (inner, lambda a: a, functools.partial(sweeping.total, b=1), [].append):
        with pytest.raises(ValueError, match=r"a store needs a function that can be imported.*top level of a module"):
            function_name(function, why="a store")
        function_name(function, why=None)
    with pytest.raises(ValueError, match="needs a function, got 3"):
        function_name(3, why=None)  # type: ignore[arg-type]


def test_keys_differ_by_function() -> None:
    assert digest("m.f", "{}") != digest("m.g", "{}")


def test_arguments_that_do_not_fit_are_named() -> None:
    check_arguments(sweeping.total, frozenset({"a", "b"}))
    check_arguments(max, frozenset({"whatever"}))
    with pytest.raises(ValueError, match=r"total\(a.*cannot be called with a, c: .*'b'"):
        check_arguments(sweeping.total, frozenset({"a", "c"}))
