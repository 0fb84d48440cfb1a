"""The command line: JSON alone on standard output, one message and exit code 2 for what cannot be."""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

import ppsim
from ppexec.cli import COMMANDS, EXAMPLES, main
from ppexec.config.config import RunConfig
from tests.support.factories import spelled

_FLAGS = "--layers 4 --hidden 8 --seq 2 --micro-batch-size 1 --microbatches 4 --threads 1 --warmup 0 --steps 1"
TINY = _FLAGS.split()


@pytest.fixture(autouse=True)
def _warnings_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command shows warnings in a way of its own."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of each wrong kind."""
    (tmp_path / "text.csv").write_text("hello\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "hang.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    (tmp_path / "good.csv").write_text(ppsim.build_schedule("afab", ranks=3, microbatches=6).to_csv())
    (tmp_path / "bad.json").write_text('{"layers": [{"name": "x"}]}')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "not_mine.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = [
    ("--layers 0", "layers must be a whole number of 1 or more, got 0"),
    ("--layers -2", "layers must be"),
    ("--layers two", "'two'"),
    ("--layers 1.5", "'1.5'"),
    ("--layers 1000000", "at most 100000"),
    ("--layers 7", "7 layers do not divide evenly over 2 stages: take 6 or 8 layers, or 1 or 7 stages"),
    ("--layers 1", "1 layers cannot fill 2 stages"),
    ("--hidden -1", "hidden must be"),
    ("--hidden x", "'x'"),
    ("--intermediate -1", "intermediate must be"),
    ("--seq -1", "seq must be"),
    ("--micro-batch-size -1", "micro_batch_size must be"),
    ("--microbatches -1", "microbatches must be"),
    ("--microbatches 10000000", "at most 100000"),
    ("--global-batch-size -1", "global_batch_size must be"),
    ("--global-batch-size 7 --micro-batch-size 2", "global batch of 6 or 8, a micro batch of 1"),
    (
        "--global-batch-size 12 --micro-batch-size 2 --microbatches 5",
        "over 5 microbatches is at most 3 samples for each",
    ),
    ("--schedule nonsense", "unknown schedule 'nonsense'"),
    ("--schedule afap", "did you mean 'afab'"),
    ("--schedule afab --stages-per-rank 2", "afab has 1 stage"),
    ("--stages-per-rank 0", "stages_per_rank must be"),
    ("--stages-per-rank many", "many"),
    ("--from-csv missing.csv", "cannot open 'missing.csv'"),
    ("--from-csv folder", "folder"),
    ("--from-csv text.csv", "'hello' is not an action"),
    ("--from-csv bytes.csv", "bytes.csv is not text"),
    ("--from-csv empty.csv", "holds no action"),
    ("--from-csv hang.csv", "wait for ever"),
    ("--from-csv good.csv --ranks 2", "has 3 ranks, but ranks is 2"),
    ("--from-csv good.csv --microbatches 5", "has 6 microbatches, but microbatches is 5"),
    ("--from-csv good.csv --layers 8", "8 layers do not divide evenly over 3 stages"),
    ("--ranks -1", "ranks must be"),
    ("--ranks 1000", "at most 256"),
    ("--ranks 3 --layers 8", "8 layers do not divide evenly over 3 stages: take 6 or 9 layers, or 2 or 4 stages"),
    ("--partition thirds", "partition must be even, optimal or sizes"),
    ("--partition 3,4", "sizes [3, 4] do not cut 8 layers into 2 stages"),
    ("--partition optimal", "optimal partition needs the layers' costs"),
    ("--dp 0", "dp must be"),
    ("--tp 0", "tp must be"),
    ("--steps 0", "steps must be"),
    ("--steps -1", "steps must be"),
    ("--warmup -1", "warmup must be"),
    ("--seed x", "'x'"),
    ("--dtype float8", "float8"),
    ("--threads -1", "threads must be"),
    ("--threads 100000", "at most 1024"),
    ("--receive-window -1", "receive_window must be"),
    ("--backend mpi", "mpi"),
    ("--backend nccl", "needs an NVIDIA GPU"),
    ("--compute fast", "fast"),
    ("--preset huge", "huge"),
    ("--costs missing.json", "cannot open 'missing.json'"),
    ("--costs folder", "folder"),
    ("--costs bad.json", "bad.json"),
    ("--costs empty.json", "empty.json"),
    ("--out no/such/place.json", "cannot write no/such/place.json: there is no directory 'no/such'"),
    ("--out folder", "cannot write folder: it is a directory"),
    ("--timeout-s 0", "timeout_s must be seconds > 0"),
    ("--timeout-s -1", "timeout_s"),
    ("--timeout-s nan", "timeout_s"),
    ("--timeout-s soon", "soon"),
    ("--model gpt5", "unknown model 'gpt5'"),
    ("--model no_module:factory", "cannot import 'no_module'"),
    ("--model not_mine:factory", "no_such_module_at_all"),
    ("--model ppexec.models.mlp:nothing", "has no function 'nothing'"),
    ("--laters 3", "--layers"),
    ("surplus", "surplus"),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("command", ["run", "verify", "profile"])
@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_is_one_message_and_exit_code_2(
    command: str, flags: str, message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *flags.split(), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("ppexec: ")
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize(("words", "message"), [(["walk"], "walk"), (["run", "--model"], "--model")])
def test_words_that_are_no_command_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "tests.support.factories:not_a_model"], "the factory must give a ppexec.Model, got list"),
        (["--model", spelled("bad_sample", gives="one")], "sample(0) must give (inputs, targets), two tensors"),
        (["--hidden", "1000000"], "GiB"),
    ],
)
def test_what_only_the_workers_can_see_is_one_message_too(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *TINY, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert message in line


@pytest.mark.parametrize("kind", ["Dies", "Raises", "Breaks"])
def test_a_run_that_cannot_end_is_exit_code_1(
    kind: str, capsys: pytest.CaptureFixture[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence first, then the user's frames, where the ranks stand, and where their trace is."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    words = ["run", *TINY, "--json", "--out", "trace.npz", "--model", spelled("with_one", kind=kind, at=3)]
    assert main_code(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    said = {
        "Dies": r"was killed by SIGKILL \(by the system, if memory ran out\) in",
        "Raises": "failed in",
        "Breaks": "failed in",
    }[kind]
    assert re.match(rf"ppexec: rank 1 \(process \d+\) {said} action 1F0 of step 1, during 'measure'", first)
    if kind == "Raises":
        assert first.endswith("layer 3 (Raises) raised ValueError: this layer takes no such input: give it another")
    assert ("in forward" in err) == (kind != "Dies")
    assert "site-packages" not in err
    assert rest[-4:] == [
        "where each rank stands:",
        "  rank 0: at action 0B0, waits for message 4 of rank 1 after its action 1B0, in step 1",
        "  rank 1: in action 1F0 of step 1",
        "what all ranks did is in trace.partial.json, for ui.perfetto.dev",
    ]
    assert json.loads((directory / "trace.partial.json").read_text())["traceEvents"]
    assert not (directory / "trace.npz").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "model 'mine:fails': the factory raised ZeroDivisionError: division by zero"),
        ("refuses", "model 'mine:refuses': the factory raised ValueError: hidden 8 is not for me"),
        ("missing", "model 'mine:missing': 'mine' has no function 'missing': give the name of one"),
    ],
)
def test_a_factory_that_raises_is_one_sentence_and_its_frames(
    name: str, said: str, capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    (directory / "mine.py").write_text(
        "def fails(config):\n    return 1 / 0\n\n"
        "def refuses(config):\n    raise ValueError(f'hidden {config.hidden} is not for me')\n"
    )
    sys.modules.pop("mine", None)
    assert main_code(["verify", *TINY, "--model", f"mine:{name}"]) == 2
    first, *frames = capsys.readouterr().err.splitlines()
    assert first == f"ppexec: {said}"
    assert [line for line in frames if line.startswith("  File")] == (
        [] if name == "missing" else [f'  File "{directory}/mine.py", line {2 if name == "fails" else 5}, in {name}']
    )


def main_code(words: list[str]) -> int:
    """The exit code, returned or raised."""
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", [[], ["run"], ["verify"], ["profile"]])
def test_help_goes_to_standard_output(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert "usage: ppexec" in out
    assert err == ""
    if command:
        assert all(flag in out for flag in ("--layers", "--from-csv", "--ranks", "--json", "--out"))
        assert f"Example: {EXAMPLES[command[0]][1]}" in out
        assert "--clip-norm" not in out
        assert main([*command, "--help-all"]) == 0
        everything = capsys.readouterr().out
        assert all(f"--{each.name.replace('_', '-')}" in everything for each in fields(RunConfig))


def test_ppexec_alone_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert set(EXAMPLES) == set(COMMANDS)
    assert all(f"ppexec {name}" in out for name in COMMANDS)


@pytest.mark.parametrize("name", ["verify", "run", "profile"])
def test_the_examples_of_help_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    program, *words = EXAMPLES[name][1].split()
    assert program == "ppexec"
    assert main_code(words) == 0


# Answers


def one_object(text: str) -> dict:
    """Exactly one line, and on it one object."""
    assert text.endswith("\n")
    (line,) = text.splitlines()
    document = json.loads(line)
    assert isinstance(document, dict)
    return document


def test_verify_prints_its_report_as_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert main(["verify", *TINY, "--json", "--out", str(path)]) == 0
    document = one_object(capsys.readouterr().out)
    assert document["outputs_bit_equal"] is document["gradients_bit_equal"] is document["gradients_equal"] is True
    assert document["max_output_diff"] == document["max_gradient_diff"] == document["tolerance"] == 0
    assert document["first_difference"] is None
    assert json.loads(path.read_text()) == document


def test_verify_says_what_differs_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_code(["verify", *TINY, "--model", spelled("with_one", kind="WrongBackward", at=3)]) == 1
    out, _ = capsys.readouterr()
    assert "outputs    bit-equal" in out
    assert "gradients  DIFFERENT" in out
    assert "first difference: gradient of layer 0 weight differs by up to" in out


def test_verify_of_an_evaluation_claims_nothing_about_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *TINY, "--forward-only"]) == 0
    assert "gradients  not computed (forward only)" in capsys.readouterr().out


def test_run_prints_and_saves_the_median_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.npz"
    assert main(["run", *TINY, "--steps", "3", "--json", "--out", str(path)]) == 0
    document = one_object(capsys.readouterr().out)
    trace = ppsim.Trace.load(path)
    assert len(document["step_times_s"]) == 3
    assert document["makespan_s"] == trace.makespan_s == sorted(document["step_times_s"])[1]
    assert document["peak_activation_bytes"] == trace.peak_activation_bytes.tolist()
    assert document["bubble_fraction"] == trace.bubble_fraction
    assert document["config"]["layers"] == 4
    assert document["environment"]["ranks"] == 2


def test_run_prints_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.startswith("afab: 2 ranks, 2 stages, 4 microbatches\n")
    assert "median step" in out
    assert "bubble fraction" in out
    assert len([line for line in out.splitlines() if line.endswith("MiB")]) == 2


@pytest.mark.parametrize("name", ["costs.json", "costs.csv"])
def test_profile_prints_and_saves_costs_that_can_be_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert main(["profile", *TINY, "--json", "--out", str(path)]) == 0
    document = one_object(capsys.readouterr().out)
    layers = ppsim.load_costs(path)
    assert [layer["name"] for layer in document["layers"]] == [layer.name for layer in layers]
    assert document["layers"][0]["forward_s"] == layers[0].forward_s
    assert document["environment"]["cores"] >= 1
    assert main(["run", *TINY, "--compute", "timed", "--costs", str(path), "--partition", "optimal", "--json"]) == 0
    assert one_object(capsys.readouterr().out)["config"]["compute"] == "timed"


def test_costs_go_to_json_or_csv(capsys: pytest.CaptureFixture[str]) -> None:
    """Known before anything is measured, not after."""
    assert main(["profile", *TINY, "--out", "costs.txt", "--model", spelled("with_one", kind="Dies", at=0)]) == 2
    assert capsys.readouterr().err.startswith("ppexec: cannot write costs.txt: cost files end in .json or .csv")


@pytest.mark.parametrize("command", ["run", "verify", "profile"])
def test_a_message_starts_with_what_is_wrong(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not with the name of a class, which read as "Run 7 layers do not divide"."""
    assert main([command, "--layers", "7"]) == 2
    assert capsys.readouterr().err.startswith("ppexec: 7 layers do not divide evenly over 2 stages")


def test_few_microbatches_warn_on_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = "verify --layers 4 --hidden 4 --seq 1 --micro-batch-size 1 --ranks 2 --microbatches 3 --threads 1 --json"
    assert main(words.split()) == 0
    out, err = capsys.readouterr()
    assert one_object(out)["gradients_bit_equal"]
    # (p - 1) / (m + p - 1) = 1/4; with 7 microbatches 1/8.
    assert err.startswith("warning: 3 microbatches over 2 ranks are fewer than 2 x ranks = 4: expect a bubble fraction")
    assert "fraction of 0.250; 7 microbatches would halve it" in err


def test_a_schedule_and_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("order.csv").write_text("0F0,0F1,0B1,0B0\n1F0,1F1,1B0,1B1\n")
    Path("words_of_mine.py").write_text(
        "import torch\nfrom torch import nn\nimport ppexec\n"
        "def make(config):\n"
        "    width = config.hidden\n"
        "    layers = [nn.Embedding(50, width), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 3)]\n"
        "    def sample(b):\n"
        "        return torch.arange(4) + b, torch.ones(4, 3) * b\n"
        "    return ppexec.Model(layers=layers, sample=sample, loss=nn.functional.mse_loss)\n"
    )
    words = "verify --model words_of_mine:make --from-csv order.csv --layers 4 --hidden 5 --partition 1,3 --json"
    assert main(words.split()) == 0
    document = one_object(capsys.readouterr().out)
    assert document["gradients_bit_equal"] is True
    assert document["compared"] == 2 + 5


def test_a_training_shows_what_it_skips_and_evaluates(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no number that is not finite; without a skip it is one message and exit code 1."""
    words = [
        "train",
        *TINY,
        "--model",
        spelled("odd_loss", at=11),
        "--ranks",
        "2",
        "--steps",
        "4",
        "--microbatches",
        "4",
    ]
    assert main([*words, "--skip-nonfinite", "--evaluate-every", "2"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert re.split(" {2,}", heading) == ["step", "loss", "gradient norm", "learning rate", "held-out loss", "update"]
    assert ["skipped" in row for row in rows] == [False, False, True, False]
    assert [row.split()[-2] == "–" for row in rows] == [True, False, True, False]
    assert main([*words, "--skip-nonfinite", "--json"]) == 0
    report = one_object(capsys.readouterr().out)
    assert report["skipped"] == [2]
    assert report["losses"][2] is report["gradient_norms"][2] is None
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(
        "ppexec: step 2: the loss of microbatch 11 (what sample(11) gives) is inf; nothing was updated"
    )


def test_training_prints_its_losses_saves_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*TINY, "--ranks", "2", "--json", "--save", str(tmp_path / "saved")]
    assert main(["train", *words, "--steps", "2", "--out", str(tmp_path / "report.json")]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["steps"] == [0, 1]
    assert first == json.loads((tmp_path / "report.json").read_text())
    assert main(["train", *words, "--resume", str(tmp_path / "saved")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [2]
    assert main(["train", *TINY, "--resume", str(tmp_path / "nothing")]) == 2
    assert "no complete checkpoint in" in capsys.readouterr().err
