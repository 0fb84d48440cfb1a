"""The tutorial runs as a script, and what it computes is what its questions are about."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import ppsim
from tests.support.studies import STUDIES, load

# One group, so that one process runs it: a minute alone, many on a machine under load.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.xdist_group("tutorial")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the tutorial prints, and where it was run."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        load("tutorial")
    return out.getvalue(), folder


def test_the_pipeline_has_the_loss_of_a_loop_without_one(told: tuple[str, Path]) -> None:
    pipeline, loop = re.findall(r"loss of the pipeline: (\S+); of one process: (\S+)", told[0])[0]
    assert pipeline == loop


def test_no_answer_is_no(told: tuple[str, Path]) -> None:
    """Every mesh, output and gradient is as one process has it."""
    assert told[0].count("True") == 3 + 2 * 4 + 2
    assert "False" not in re.sub(r"(?s)limit: .*?is one of the published: False", "", told[0])


def test_messages_have_the_shape_that_is_computed(told: tuple[str, Path]) -> None:
    assert "[2, 8192, 4096] of torch.bfloat16: 128 MiB" in told[0]
    stated, sent = re.findall(r": (\d+) bytes; sent: \[(\d+)\]", told[0])[0]
    assert stated == sent == str(2 * 16 * 64 * 4)


def test_bubbles_are_those_of_the_formula(told: tuple[str, Path]) -> None:
    for factor, *fractions in re.findall(r"^([1248]) +(0\.\d+) +(0\.\d+) +(0\.\d+)$", told[0], re.MULTILINE):
        expected = [(p - 1) / (int(factor) * p + p - 1) for p in (2, 4, 8)]
        assert [float(each) for each in fractions] == pytest.approx(expected, abs=1e-6)


def test_the_schedule_that_is_found_keeps_a_limit_that_no_published_one_keeps(told: tuple[str, Path]) -> None:
    text, folder = told
    table = text[text.index("keeps the limit") : text.index("\nholds ")]
    assert table.count("False") == len(re.findall(r"^\S+ +[\d.]+ +[\d.]+ +(?:True|False)$", table, re.MULTILINE)) > 5
    found = ppsim.Schedule.from_csv((folder / "studies/out/tutorial/found.csv").read_text())
    found.check()
    cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1)
    published = [ppsim.build_schedule(name, ranks=4, microbatches=8) for name in ppsim.schedule_names()]
    assert all(found.orders != each.orders for each in published)
    assert ppsim.simulate(found, [cost] * 4).peak_activation_bytes.max() <= 3
    step, bound = re.findall(r"step (\S+) ms; no order under the limit is below (\S+) ms", text)[0]
    assert float(step) >= float(bound) > 0


def test_cells_are_marked_for_notebooks() -> None:
    text = (STUDIES / "tutorial.py").read_text(encoding="utf-8")
    assert text.count("\n# %% [markdown]\n") >= 11
    assert text.count("\n# %%\n") >= 13
