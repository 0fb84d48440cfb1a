"""`ppsim estimate` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsim import LayerCost, Transformer, estimate_costs, load_costs, named_device
from tests.support.commandline import refused, run, run_json
from tests.support.transformers import CONFIGS, PUBLISHED

SIZES = "--layers 2 --hidden 64 --heads 4 --seq 16 --vocabulary 100"
RATES = "--flops-per-s 1e12 --bytes-per-s 1e11"


def test_json_is_estimate_costs(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_json(capsys, "estimate", SIZES, "--device a100 --efficiency 0.5 --micro-batch-size 3")
    model = Transformer.gpt(layers=2, hidden=64, heads=4, vocabulary=100, positions=16, tied=False)
    costs = estimate_costs(model, named_device("a100", efficiency=0.5), micro_batch_size=3, seq=16)
    assert [LayerCost(**layer) for layer in printed["layers"]] == costs
    assert printed["parameters"] == model.parameters


def test_what_is_written_can_be_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, out = tmp_path / "config.json", tmp_path / "costs.json"
    config.write_text(json.dumps(PUBLISHED["llama-3-8b"][1]))
    flags = f"--huggingface {config} --device h100 --seq 8192 --tp 8 --tp-bytes-per-s 450e9 --out {out}"
    printed = run_json(capsys, "estimate", flags, "--recompute full")
    assert printed["parameters"] == 8_030_261_248
    assert [LayerCost(**layer) for layer in printed["layers"]] == load_costs(out)
    assert json.loads(out.read_text())["environment"]["estimated"] is True
    simulated = run_json(
        capsys, f"simulate --schedule 1f1b --ranks 4 --microbatches 8 --costs {out} --partition optimal"
    )
    work_s = sum(layer.work_s for layer in load_costs(out))
    assert simulated["makespan_s"] >= 8 * work_s / 4


def test_text_shows_one_row_for_all_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "estimate", SIZES, RATES)
    assert (code, err) == (0, "")
    assert "each of 2 blocks" in out
    assert "1e+12 FLOP/s" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{RATES} --layers 2 --hidden 64", "--heads is missing"),
        (f"{SIZES}", "no device"),
        (f"{SIZES} --flops-per-s 1e12", "no device"),
        (f"{SIZES} {RATES} --device h100", "leave out --flops-per-s or --device"),
        (f"{SIZES} --device abacus", "unknown device 'abacus'"),
        (f"{SIZES} --device h100 --dtype-bytes 4", "elements of 2 bytes"),
        (f"{SIZES} --device h100 --efficiency 2", "efficiency must be a share"),
        (f"{SIZES} {RATES} --tp 3", "tp 3 must divide heads 4"),
        (f"{SIZES} {RATES} --recompute selective", "fused attention does not keep"),
        (f"{SIZES} {RATES} --seq 0", "positive|seq must be a whole number of 1 or more"),
        (f"{SIZES} {RATES} --out costs.txt", ".json or .csv"),
        (f"{RATES} --layers 99999999 --hidden 64 --heads 4", "at most 100000"),
        (f"{RATES} --huggingface nowhere.json", "cannot open 'nowhere.json'"),
        (f"{RATES} --huggingface c.json --heads 4", "leave out --heads or --huggingface"),
    ],
)
def test_bad_input_is_one_message(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    message = refused(capsys, "estimate", words)
    assert any(part in message for part in said.split("|"))


def test_layers_that_differ_have_rows_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["deepseek-v3"]["config"]))
    flags = f"--huggingface {config} --device h100 --ep 64 --ep-bytes-per-s 5e10"
    _, text, _ = run(capsys, "estimate", flags)
    assert "671,026,419,200 parameters in 61 blocks" in text
    assert "not counted: num_nextn_predict_layers" in text
    assert "each of 58 blocks (8 of 256 experts)" in text
    layers = run_json(capsys, "estimate", flags, "--mtp")["layers"]
    assert [layer["name"] for layer in layers[-2:]] == ["mtp 0", "head"]
    assert layers[4]["forward_communication_s"] > 0 == layers[1]["forward_communication_s"]
