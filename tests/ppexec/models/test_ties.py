"""Ties: which places of a chain are one weight, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppexec.models.ties import joined_ties


def chain(count: int = 4, **options: Any) -> list[nn.Module]:
    return [nn.Linear(2, 2, **options) for _ in range(count)]


def test_stated_ties_are_kept_in_the_order_of_the_chain() -> None:
    tied = [((3, "weight"), (0, "weight")), ((1, "bias"), (2, "bias"))]
    assert joined_ties(chain(), tied) == [((0, "weight"), (3, "weight")), ((1, "bias"), (2, "bias"))]


def test_places_of_one_layer_are_in_the_order_of_their_names() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert joined_ties([layer], [((0, "1.bias"), (0, "0.bias"))]) == [((0, "0.bias"), (0, "1.bias"))]


@given(st.permutations([(0, 1), (1, 2), (2, 3), (0, 3)]), st.integers(3, 4))
def test_a_chain_of_pairs_is_one_tie_however_it_is_stated(pairs: list[tuple[int, int]], count: int) -> None:
    """Three of the four pairs connect all four places."""
    tied = [[(at, "weight") for at in pair] for pair in pairs[:count]]
    assert joined_ties(chain(), tied) == [tuple((at, "weight") for at in range(4))]


def test_a_module_that_is_listed_several_times_is_tied_in_all_of_its_parameters() -> None:
    first, other = chain(2)
    assert joined_ties([first, other, first], []) == [((0, "weight"), (2, "weight")), ((0, "bias"), (2, "bias"))]


def test_stated_and_shared_ties_are_joined() -> None:
    first, second, third, fourth = chain(bias=False)
    third.weight = first.weight
    tied = joined_ties([first, second, third, fourth], [((2, "weight"), (3, "weight"))])
    assert tied == [((0, "weight"), (2, "weight"), (3, "weight"))]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_that_share_nothing_are_not_tied(device: str) -> None:
    with torch.device(device):
        assert joined_ties(chain(), []) == []


WRONG: list[tuple[Any, str]] = [
    ([[(0, "weight"), (4, "weight")]], "tied: there is no layer 4: the chain has layers 0 to 3"),
    ([[(0, "weight"), (-1, "weight")]], "tied: there is no layer -1"),
    ([[(0, "weight"), (True, "weight")]], "tied: there is no layer True"),
    ([[(0, "weight"), ("1", "weight")]], "tied: there is no layer '1'"),
    ([[(0, "wieght"), (1, "weight")]], "layer 0 (Linear) has no parameter 'wieght': it has weight, bias"),
    ([[(0, "weight"), (1, None)]], "layer 1 (Linear) has no parameter None"),
    ([[(0, "weight"), (1, "bias")]], "are tied, but are [2, 2] torch.float32 and [2] torch.float32: make them alike"),
    ([[(0, "weight")]], "is one place: give two or more"),
    ([[(0, "weight"), (0, "weight")]], "is one place: give two or more"),
    ([[0, 1]], "0 is no place: give (layer, parameter name)"),
]


@pytest.mark.parametrize(("tied", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_tied_is_refused_in_one_sentence(tied: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        joined_ties(chain(), tied)
