"""Cost files survive a round trip, and every mistake is named with file, layer, field and value."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ppsim import CostError, LayerCost, load_costs, save_costs

_seconds = st.floats(0, 1e300, allow_nan=False)
_bytes = st.integers(0, 2**53)
_layers = st.lists(
    st.builds(
        LayerCost,
        name=st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
        forward_s=_seconds,
        backward_input_s=_seconds,
        backward_weight_s=_seconds,
        backward_s=st.none() | _seconds,
        activation_bytes=_bytes,
        weight_activation_bytes=_bytes,
        output_bytes=_bytes,
        parameter_bytes=_bytes,
        output_gradient_bytes=st.none() | _bytes,
        recompute_s=st.none() | _seconds,
        recompute_bytes=st.none() | _bytes,
        offload_bytes=st.none() | _bytes,
    ),
    min_size=1,
    max_size=4,
)
_in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
_HEADER = "forward_s,backward_input_s,backward_weight_s"


def _written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@_in_folder
@given(layers=_layers, ending=st.sampled_from([".json", ".csv", ".JSON"]))
def test_round_trip(tmp_path: Path, layers: list[LayerCost], ending: str) -> None:
    path = tmp_path / f"costs{ending}"
    save_costs(layers, path, environment={"cores": 2})
    assert load_costs(path) == layers


def test_json_holds_the_environment(tmp_path: Path) -> None:
    layer = LayerCost(forward_s=1, backward_input_s=2, backward_weight_s=3, name="a")
    save_costs([layer], tmp_path / "c.json", environment={"cores": 2})
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["environment"] == {"cores": 2}
    assert document["layers"][0]["name"] == "a"


@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_bytes_held_as_floats_or_numpy_numbers_survive(tmp_path: Path, ending: str) -> None:
    """Cause of a bug: 1e6 bytes were written to CSV as 1000000.0 and refused there; JSON does not know np.int64."""
    layer = LayerCost(
        forward_s=np.float32(0.5),
        backward_input_s=np.float64(1),
        backward_weight_s=0,
        activation_bytes=1e6,
        output_bytes=np.int64(3),
    )
    save_costs([layer], tmp_path / f"c{ending}")
    assert load_costs(tmp_path / f"c{ending}") == [layer]


def test_what_a_csv_leaves_out_takes_its_default(tmp_path: Path) -> None:
    path = _written(tmp_path, "c.csv", f"{_HEADER},backward_s,output_bytes\n1,2,3,,\n\n4,5,6,7,8\n")
    assert load_costs(path) == [
        LayerCost(forward_s=1, backward_input_s=2, backward_weight_s=3, name="layer 0"),
        LayerCost(forward_s=4, backward_input_s=5, backward_weight_s=6, backward_s=7, output_bytes=8, name="layer 1"),
    ]


@pytest.mark.parametrize("name", ["c.csv", "c.json"])
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path, name: str) -> None:
    """Cause of a bug: what spreadsheets save was refused for its first column's name."""
    layer = LayerCost(forward_s=1, backward_input_s=2, backward_weight_s=3, name="a")
    save_costs([layer], tmp_path / name)
    marked = _written(tmp_path, f"marked-{name}", b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_costs(marked) == [layer]


_ROW = '{"forward_s": 1, "backward_input_s": 1, "backward_weight_s": 1}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", "", "is not JSON"),
        ("c.json", "[1]", 'must be an object with a list "layers"'),
        ("c.json", "{}", 'must be an object with a list "layers"'),
        ("c.json", '{"layers": [1]}', 'must be an object with a list "layers"'),
        ("c.json", '{"layers": []}', "holds no layer: give at least one"),
        ("c.json", '{"layers": [{}]}', "layer 0: forward_s is missing"),
        ("c.json", f'{{"layers": [{_ROW}, {{"forward_s": 1}}]}}', "layer 1: backward_input_s is missing"),
        ("c.json", f'{{"layers": [{_ROW[:-1]}, "x": 1}}]}}', "layer 0: unknown field 'x'; known are"),
        ("c.json", f'{{"layers": [{_ROW[:-1]}, "name": 1}}]}}', "layer 0: name must be text, got 1"),
        ("c.json", '{"layers": [' + _ROW.replace("1", "NaN", 1) + "]}", "layer 0: forward_s must be seconds, finite"),
        ("c.json", '{"layers": [' + _ROW.replace("1", "-1", 1) + "]}", "got -1"),
        ("c.json", '{"layers": [' + _ROW.replace("1", '"1"', 1) + "]}", "got '1'"),
        # Causes of bugs: numbers and nesting beyond Python's limits raise what is no JSONDecodeError.
        ("c.json", '{"layers": [' + _ROW.replace("1", "9" * 400, 1) + "]}", "forward_s must be seconds, finite"),
        ("c.json", '{"layers": [' + _ROW.replace("1", "9" * 5000, 1) + "]}", "is not JSON"),
        ("c.json", "[" * 200_000, "is not JSON"),
        ("c.json", b"\xff\xfe\x00", "is not text"),
        ("c.csv", "", "holds no layer"),
        ("c.csv", f"{_HEADER}\n", "holds no layer"),
        ("c.csv", f"{_HEADER}\n1,2\n", "layer 0: the row has not as many cells as the header, 3"),
        ("c.csv", f"{_HEADER}\n1,2,3\n1,2,3,4\n", "layer 1: the row has not as many cells as the header, 3"),
        ("c.csv", f"{_HEADER}\n1,,3\n", "layer 0: backward_input_s must be a number, got ''"),
        ("c.csv", f"{_HEADER}\n1,x,3\n", "layer 0: backward_input_s must be a number, got 'x'"),
        ("c.csv", f"{_HEADER}\n1,nan,3\n", "layer 0: backward_input_s must be seconds, finite and >= 0, got nan"),
        ("c.csv", f"{_HEADER},output_bytes\n1,2,3,4.5\n", "output_bytes must be a whole number, got '4.5'"),
        ("c.csv", f"{_HEADER},x\n1,2,3,4\n", "layer 0: unknown field 'x'"),
        # Cause of a bug: a cell under an unknown header was read as a number before the header was looked at.
        ("c.csv", f"{_HEADER},comment\n1,2,3,hello\n", "layer 0: unknown field 'comment'"),
        ("c.csv", "forward_s,backward_input_s\n1,2\n", "layer 0: backward_weight_s is missing"),
        # Cause of a bug: the last of two columns of one name won silently.
        ("c.csv", f"{_HEADER},forward_s\n1,2,3,4\n", "has the column 'forward_s' twice: keep one"),
        # Cause of a bug: csv.Error is no ValueError.
        ("c.csv", f"{_HEADER}\n{'9' * 200_000},1,1\n", "is not CSV: field larger than field limit"),
        ("c.txt", "x", "cost files end in .json or .csv"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = _written(tmp_path, name, content)
    with pytest.raises(CostError) as caught:
        load_costs(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_costs(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(IsADirectoryError):
        load_costs(tmp_path / "folder.json")


def test_costs_are_saved_by_ending_too(tmp_path: Path) -> None:
    with pytest.raises(CostError, match=r"cost files end in \.json or \.csv"):
        save_costs([], tmp_path / "c.txt")


_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
_fields = st.sampled_from(["forward_s", "backward_input_s", "backward_weight_s", "output_bytes", "name", "x"])
_documents = st.recursive(
    _values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_fields, inner, max_size=5), max_leaves=20
)
_tables = st.lists(st.lists(_fields | st.sampled_from(["1", "-1", "nan", "1e999", '"', ""]), max_size=5), max_size=4)


@_in_folder
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | _documents.map(lambda document: json.dumps({"layers": [document]}).encode())
    | _tables.map(lambda rows: "\n".join([_HEADER, *map(",".join, rows)]).encode()),
    ending=st.sampled_from([".json", ".csv"]),
)
@example(content=b'"\r', ending=".csv")
@example(content=b"\x00", ending=".csv")
@example(content=b'a,"b\n', ending=".csv")
def test_rubbish_is_costs_or_a_cost_error(tmp_path: Path, content: bytes, ending: str) -> None:
    path = _written(tmp_path, f"c{ending}", content)
    try:
        layers = load_costs(path)
    except CostError as error:
        named = str(error)
        assert str(path) in named
        return
    save_costs(layers, path)
    assert load_costs(path) == layers
