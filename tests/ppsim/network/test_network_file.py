"""Network files: what is written is read, and what has no meaning is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppsim import CostError, Link, LinkPiece, Network
from tests.support.strategies import networks


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(networks(4, most_pieces=3))
def test_what_is_written_is_read(tmp_path: Path, network: Network) -> None:
    network = Network.of(network.default, {pair: link for pair, link in network.links.items() if pair[0] != pair[1]})
    network.to_file(tmp_path / "n.json")
    assert Network.from_file(tmp_path / "n.json") == network


def test_any_float_survives(tmp_path: Path) -> None:
    pieces = (LinkPiece(from_bytes=7, latency_s=1 / 3, gap_s=1e-300, bytes_per_s=1e308 / 3),)
    network = Network(latency_s=0.1, gap_s=1e-9 / 7, larger=pieces, links={(3, 0): Link(bytes_per_s=1e-3 / 7)})
    network.to_file(tmp_path / "n.json")
    assert Network.from_file(tmp_path / "n.json") == network


def test_the_file_says_where_and_from_what(tmp_path: Path) -> None:
    Network().to_file(tmp_path / "n.json", environment={"cores": 2}, samples=[{"size_bytes": 8}])
    assert json.loads((tmp_path / "n.json").read_text()) == {
        "version": 1,
        "default": {"latency_s": 0.0, "gap_s": 0.0},
        "links": [],
        "environment": {"cores": 2},
        "samples": [{"size_bytes": 8}],
    }


def test_little_has_to_be_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text('{"version": 1, "links": [{"source": 0, "destination": 1, "latency_s": 2}]}')
    assert Network.from_file(tmp_path / "n.json") == Network(links={(0, 1): Link(latency_s=2)})


PAIR = {"source": 0, "destination": 1}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "must be an object, as {"),
        ({}, "version must be 1, got none: give a network file"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": True}, "version must be 1, got true"),
        ({"version": 1, "link": []}, "unknown field 'link'; known are version, default, links, environment, samples"),
        ({"version": 1, "default": 3}, "default link must be an object, got 3"),
        ({"version": 1, "default": {"latency": 3}}, "default link: unknown field 'latency'; known are latency_s"),
        ({"version": 1, "default": {"latency_s": "x"}}, "default link: latency_s must be seconds.*got 'x'"),
        ({"version": 1, "default": {"latency_s": None}}, "default link: latency_s must be seconds.*got None"),
        ({"version": 1, "default": {"gap_s": -1}}, "default link: gap_s must be seconds.*got -1"),
        ({"version": 1, "default": {"bytes_per_s": 0}}, r"default link: bytes_per_s must be > 0 \(leave it out"),
        ({"version": 1, "default": {"from_bytes": 0}}, "default link: unknown field 'from_bytes'"),
        ({"version": 1, "default": {"larger": {}}}, "default link: larger must be a list of objects, got {}"),
        ({"version": 1, "default": {"larger": [1]}}, "default link, larger 0 must be an object, got 1"),
        ({"version": 1, "default": {"larger": [{}]}}, "default link, larger 0: from_bytes is missing: give the size"),
        ({"version": 1, "default": {"larger": [{"from_bytes": 1.5}]}}, "from_bytes must be a whole number.*got 1.5"),
        ({"version": 1, "default": {"larger": [{"from_bytes": 0}]}}, "must ascend in from_bytes, .*got 0 after 0"),
        (
            {"version": 1, "default": {"latency_s": 2, "larger": [{"from_bytes": 9, "latency_s": 1}]}},
            "default link: a message of 9 bytes would take 1.0 s and one of 8 bytes 2.0 s: give pieces",
        ),
        ({"version": 1, "links": {}}, "links must be a list of objects, got {}"),
        ({"version": 1, "links": [1]}, "link 0 must be an object, got 1"),
        ({"version": 1, "links": [{}]}, "link 0: source is missing: give a rank"),
        ({"version": 1, "links": [{"source": -1}]}, "link 0: source must be a rank, 0 or more, got -1"),
        ({"version": 1, "links": [{"source": 0, "destination": True}]}, "destination must be a rank.*got true"),
        ({"version": 1, "links": [{"source": 1, "destination": 1}]}, "link 1 to 1: destination is the source"),
        ({"version": 1, "links": [PAIR, PAIR]}, "link 0 to 1 is there twice: keep one"),
        ({"version": 1, "links": [{**PAIR, "latency_s": -2}]}, "link 0 to 1: latency_s must be seconds.*got -2"),
    ],
)
def test_files_without_meaning_are_refused(tmp_path: Path, document: object, said: str) -> None:
    path = tmp_path / "n.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CostError, match=said) as caught:
        Network.from_file(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "default": NaN}'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "n.json").write_bytes(content)
    with pytest.raises(CostError, match=r"n\.json"):
        Network.from_file(tmp_path / "n.json")


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["source", "destination", "latency_s", "bytes_per_s", "larger", "from_bytes"]), inner
        )
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_json, st.lists(_json, max_size=3) | _json)
def test_any_values_give_a_network_or_one_message(tmp_path: Path, default: object, links: object) -> None:
    (tmp_path / "n.json").write_text(json.dumps({"version": 1, "default": default, "links": links}))
    try:
        network = Network.from_file(tmp_path / "n.json")
    except CostError as error:
        said = str(error)
    else:
        said = str(tmp_path)
        assert isinstance(network, Network)
    assert said.startswith(str(tmp_path))
