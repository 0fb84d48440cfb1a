"""Layouts are read as Megatron spells them out, written so that they read back, and never guessed at."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, LayerCost, Layout, build_schedule, partition, partition_sizes, simulate
from tests.support.commandline import refused, run_json

# DeepSeek-V3 on 16 ranks with 2 stages each, as in Megatron's documentation: 61 layers, one of MTP.
DEEPSEEK = "Et*3|(tt|)*29,m|L"


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        (DEEPSEEK, ["Ettt"] + ["tt"] * 29 + ["m", "L"]),
        ("Et|tL", ["Et", "tL"]),
        ("E|(tt|t|)*2,t|L", ["E", "tt", "t", "tt", "t", "t", "L"]),
        ("E,(t|t)*2|L", ["Et", "tt", "t", "L"]),
        ("Et||tL", ["Et", "", "tL"]),
        ("Et|*3tL", ["Et", "", "", "tL"]),
        ("(t*2|)*2t", ["tt", "tt", "t"]),
        ("t|t|", ["t", "t", ""]),
        (" Et | tL\n", ["Et", "tL"]),
    ],
)
def test_stages_are_written_out(text: str, stages: list[str]) -> None:
    assert list(Layout.parse(text).stages) == stages


def _expanded(text: str) -> list[str]:
    """The layout written out by a scan from left to right, which is not how it is read."""
    out, at = "", 0
    while at < len(text):
        close = text.index(")", at) + 1 if text[at] == "(" else at + 1
        unit = "|".join(_expanded(text[at + 1 : close - 1])) if text[at] == "(" else text[at]
        count = re.match(r"\*(\d+)", text[close:])
        out += unit * int(count[1] if count else 1)
        at = close + (len(count[0]) if count else 0)
    return out.split("|")


_stages = st.builds(
    lambda counts, mtp, ends: [
        ("E" if ends[0] and at == 0 else "")
        + "t" * count
        + ("m" * mtp + "L" * ends[1] if at == len(counts) - 1 else "")
        for at, count in enumerate(counts)
    ],
    st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(lambda counts: counts[0] > 0),
    st.integers(0, 2),
    st.tuples(st.booleans(), st.booleans()),
)


@given(_stages)
def test_what_is_written_reads_back(stages: list[str]) -> None:
    layout = Layout(stages=stages)
    assert list(Layout.parse(str(layout)).stages) == stages == _expanded(str(layout))
    assert len(str(layout)) <= len("|".join(stages))


def test_sizes_are_written_as_layout() -> None:
    written = Layout.of_sizes([4, *[2] * 29, 1, 1], prediction_layers=1)
    assert written == Layout.parse(DEEPSEEK)
    assert str(Layout.of_sizes([2, 2], embedding=False, head=False)) == "tt|tt"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Et|xL", "'x' cannot be read"),
        ("Et|(tL", "'\\('"),
        ("E(t|(t|)*2)*2L", "cannot be read"),
        ("Et*|L", "'\\*' cannot be read"),
        ("", "no layer"),
        ("|Et|L", "first stage is empty"),
        ("Et|L|", "last stage"),
        ("tE|L", "order E, t, m, L"),
        ("Etm|tL", "order E, t, m, L"),
        ("Et|LL", "at most one E and one L"),
        ("Et*99999999999999999999|L", "longer than"),
        ("E(t|)*9999999L", "longer than"),
    ],
)
def test_what_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Layout.parse(text)


def test_a_count_that_does_not_come_out_is_an_error() -> None:
    """30 layers over 4 stages must never become 28."""
    with pytest.raises(InputError, match=r"28 layers .*28 t.* there are 30"):
        partition_sizes(30, stages=4, method="layout", layout="t*7|t*7|t*7|t*7")
    with pytest.raises(InputError, match="3 stages, and 4 are wanted"):
        partition_sizes(30, stages=4, method="layout", layout="t*10|t*10|t*10")
    assert partition_sizes(30, stages=4, method="layout", layout="t*7|t*8|t*8|t*7") == [7, 8, 8, 7]


def test_layout_and_method_go_together() -> None:
    with pytest.raises(InputError, match="give layout"):
        partition_sizes(4, stages=2, method="layout")
    with pytest.raises(InputError, match="leave one out"):
        partition_sizes(4, stages=2, method="even", layout="tt|tt")


LAYER = LayerCost(
    forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=10, output_bytes=3, output_gradient_bytes=2
)


def test_an_empty_stage_hands_on() -> None:
    """It takes no time; the step is as long as on one rank less, but for its messages."""
    stages = partition([LAYER] * 4, stages=3, method="layout", layout="tt||tt")
    assert [stage.forward_s for stage in stages] == [2, 0, 2]
    assert (stages[1].output_bytes, stages[1].output_gradient_bytes, stages[1].activation_bytes) == (3, 2, 3)
    assert stages[1].parameter_bytes == 0
    through = simulate(build_schedule("1f1b", ranks=3, microbatches=6), stages)
    direct = simulate(build_schedule("afab", ranks=2, microbatches=1), [stages[0], stages[2]])
    assert simulate(build_schedule("afab", ranks=3, microbatches=1), stages).makespan_s == direct.makespan_s
    assert through.message_bytes.tolist().count(3) == 2 * 6


def test_the_command_line_takes_a_layout(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    from ppsim import save_costs

    path = tmp_path / "costs.json"
    save_costs([replace(LAYER, name=f"layer {number}") for number in range(5)], path)
    words = ["simulate", "--schedule", "1f1b", "--ranks", "3", "--microbatches", "4", "--costs", str(path)]
    found = run_json(capsys, *words, "--layout", "Et||t*2L")
    stages = partition([LAYER] * 5, stages=3, method="layout", layout="Et||ttL")
    assert found["makespan_s"] == simulate(build_schedule("1f1b", ranks=3, microbatches=4), stages).makespan_s
    assert "leave out --partition" in refused(capsys, *words, "--layout", "Et||ttL", "--partition", "even")
    assert "6 layers" in refused(capsys, *words, "--layout", "Et|t|ttL")
    assert "--costs" in refused(capsys, *words[:-2], "--layout", "Et||ttL")
