"""Flags: every bad input is exit code 2 with one message and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppsim import LayerCost, save_costs
from ppsim.cli.main import main
from tests.support.commandline import AFAB, COSTS, refused, run_json


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("simulat", "Unrecognized options: simulat; Available subcommands: schedule, simulate"),
        ("schedule", "no schedule: give --schedule, --ranks and --microbatches, or --from-csv FILE"),
        ("schedule --ranks 3", "no schedule: give --schedule"),
        (
            "schedule --schedule afab --microbatches 2",
            "--schedule afab needs --ranks: give a whole number of 1 or more",
        ),
        ("schedule --schedule afab --ranks 2", "--schedule afab needs --microbatches"),
        ("schedule --schedule afba --ranks 2 --microbatches 2", "unknown schedule 'afba': did you mean 'afab'?"),
        ("schedule --schedule afab --ranks x --microbatches 2", "--ranks must be a whole number, got 'x'"),
        ("schedule --schedule afab --ranks 2.0 --microbatches 2", "--ranks must be a whole number, got '2.0'"),
        ("schedule --schedule afab --ranks 0 --microbatches 2", "ranks must be a whole number of 1 or more, got 0"),
        ("schedule --schedule afab --ranks -1 --microbatches 2", "ranks must be a whole number of 1 or more, got -1"),
        ("schedule --schedule afab --ranks 2 --microbatches -1", "microbatches must be a whole number of 1 or more"),
        ("schedule --schedule afab --ranks 2 --microbatches nan", "--microbatches must be a whole number, got 'nan'"),
        # Causes of bugs: sizes that filled the memory before anything complained.
        ("schedule --schedule afab --ranks 4 --microbatches 1000000000000", "take at most 1000000 microbatches"),
        ("schedule --schedule afab --ranks 1000000000000 --microbatches 1", "take at most 100000"),
        (f"schedule --schedule afab --ranks {'9' * 5000} --microbatches 1", "--ranks must be a whole number, got '999"),
        ("schedule --schedule afab --ranks 2 --microbatches 2 --stages-per-rank 3", "leave it out or set it to 1"),
        ("schedule --schedule afab --ranks 2 --microbatches 2 --stages-per-rank 0", "stages_per_rank must be a whole"),
        (f"schedule {AFAB} --from-csv x.csv", "leave out --schedule or --from-csv"),
        ("schedule --stages-per-rank 1 --from-csv x.csv", "leave out --stages-per-rank or --from-csv"),
        ("schedule --from-csv none.csv", "cannot open 'none.csv': No such file or directory"),
        ("schedule --from-csv .", "cannot open '.': Is a directory"),
        (f"schedule {AFAB} --csv .", "cannot write .: it is a directory"),
        (f"schedule {AFAB} --csv none/x.csv", "cannot write none/x.csv: there is no directory 'none'"),
        (f"schedule {AFAB} --forward-s 1", "--forward-s 1; perhaps you meant --forward-s"),
        (f"schedule {AFAB} --json 3", "Unrecognized options: 3"),
        (
            f"simulate {AFAB} --backward-s 2",
            "--forward-s is missing: give it in seconds, or all costs with --costs FILE",
        ),
        (f"simulate {AFAB} --forward-s 1", "--backward-input-s is missing"),
        (f"simulate {AFAB} --forward-s 1 --backward-input-s 1", "--backward-weight-s is missing"),
        (f"simulate {AFAB} {COSTS} --costs c.json", "leave out --forward-s or --costs"),
        (f"simulate {AFAB} --costs c.json --output-bytes 3", "leave out --output-bytes or --costs"),
        (f"simulate {AFAB} {COSTS} --partition even", "--partition even cuts the layers of a cost file"),
        (f"simulate {AFAB} --costs none.json", "cannot open 'none.json'"),
        (f"simulate {AFAB} --costs .", "cannot open '.': Is a directory"),
        (f"simulate {AFAB} {COSTS} --network n.json --latency-s 0", "leave out --latency-s or --network"),
        (f"simulate {AFAB} {COSTS} --network n.json --bytes-per-s 1", "leave out --bytes-per-s or --network"),
        ("search --ranks 2 --microbatches 2 --network n.json --latency-s 1", "leave out --latency-s or --network"),
        (f"simulate {AFAB} {COSTS} --network none.json", "cannot open 'none.json': No such file or directory"),
        (f"simulate {AFAB} {COSTS} --network .", "cannot open '.': Is a directory"),
        (f"simulate {AFAB} {COSTS} --engine warp", "unknown engine 'warp': known are simpy"),
        (f"simulate {AFAB} {COSTS} --out .", "cannot write .: it is a directory"),
        (f"simulate {AFAB} {COSTS} --out none/t", "cannot write none/t: there is no directory 'none'"),
        (f"simulate {AFAB} {COSTS} --out none/t.json.gz", "cannot write none/t.json.gz: there is no directory 'none'"),
        (f"simulate {AFAB} {COSTS} --out none/t.csv", "cannot write none/t.csv: there is no directory 'none'"),
        (f"simulate {AFAB} {COSTS} --frward-only", "perhaps you meant --forward-only"),
        (f"simulate {AFAB} --forward-s 1e308 --backward-s 1e308", "the step takes longer than a float holds"),
        (f"simulate {AFAB} {COSTS} --output-bytes 1000000 --bytes-per-s 1e-305", "than a float holds"),
    ],
)
def test_bad_input_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("simulat", "plan, fit-machine, attribute, compare, import, explore, advise; see ppsim --help\n"),
        (f"simulate {AFAB} --bogus", "Unrecognized options: --bogus; see ppsim simulate --help\n"),
        ("simulate --rank 4", "--slow-rank or --stages-per-rank; see ppsim simulate --help\n"),
        ("simulate --ranks x", "--ranks must be a whole number, got 'x'; see ppsim simulate --help\n"),
        (
            f"simulate {AFAB} --overlap -1",
            " --overlap must be a finite number > 0, got -1.0; see ppsim simulate --help\n",
        ),
        (f"simulate {AFAB} --slow-ranks 1=2 --cores 0", " --cores must be a whole number of 1 or more, got 0"),
    ],
)
def test_message_names_flag_command_and_all_that_is_known(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """Causes of bugs: the box's width cut lists, its last line named no command, and options were named as fields."""
    assert said in refused(capsys, words)


_NUMBERS = ["forward-s", "backward-input-s", "backward-weight-s", "backward-s", "latency-s", "bytes-per-s", "overlap"]


@pytest.mark.parametrize("flag", _NUMBERS)
@pytest.mark.parametrize("value", ["x", "nan", "-1", "-inf", "1,5", "--json"])
def test_numbers_without_meaning(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    said = refused(capsys, "simulate", AFAB, COSTS, f"--{flag} {value}")
    assert flag in said.replace("_", "-")
    assert value == "--json" or value in said


@pytest.mark.parametrize("flag", ["activation-bytes", "weight-activation-bytes", "output-bytes"])
@pytest.mark.parametrize("value", ["x", "1.5", "-1", "1e3", "nan", "9007199254740993", "1" + "0" * 30])
def test_bytes_without_meaning(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    said = refused(capsys, "simulate", AFAB, COSTS, f"--{flag} {value}")
    assert flag in said.replace("_", "-")
    assert value in said


@pytest.mark.parametrize("flag", ["infinity", "0"])
def test_no_limit_can_be_written_and_no_bandwidth_cannot(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    words = ("simulate", AFAB, COSTS, f"--bytes-per-s {flag}")
    if flag == "0":
        assert "bytes_per_s must be > 0 (leave it out for no limit), got 0.0" in refused(capsys, *words)
    else:
        assert run_json(capsys, *words)["details"]["bytes_per_s"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the schedule holds no action"),
        (b"\n\n\n", "the schedule holds no action"),
        (b"\x89PNG\r\n\x1a\n\x00", "is not text"),
        (b"\x00\x00\x00", "row 1, column 1: '\\x00\\x00\\x00' is not an action"),
        (b"0F0,0B0\n1F0,oops", "row 2, column 2: 'oops' is not an action"),
        (b"0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1", "the schedule would wait for ever"),
        (b"0F0,0F1,0B0,0B1,0B1", "0B1 occurs 2 times"),
        (b"0F0,0B0,0F2147483647", "stage 0, microbatch 1 has no F: add 0F1"),
        (b"0F0,0B0,4294967296F0", "row 1, column 3: stage 4294967296 is too large"),
        (b"0F0," + b"0" * 200_000, "the schedule is not CSV"),
    ],
)
@pytest.mark.parametrize("subcommand", ["schedule", f"simulate {COSTS}"])
def test_schedule_files_without_meaning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, subcommand: str, content: bytes, said: str
) -> None:
    (tmp_path / "s.csv").write_bytes(content)
    message = refused(capsys, subcommand, f"--from-csv {tmp_path}/s.csv")
    assert said in message
    assert f"{tmp_path}/s.csv" in message


@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        ("c.json", b"", "", "is not JSON"),
        ("c.json", b"\xff\xfe", "", "is not text"),
        ("c.csv", b"forward_s,backward_input_s,backward_weight_s\n1,1,-1\n", "", "layer 0: backward_weight_s must be"),
        ("c.txt", b"", "", "cost files end in .json or .csv"),
        ("4.csv", None, "", "4 layers do not divide evenly over 3 stages: take 3 or 6 layers"),
        ("2.csv", None, "--partition optimal", "2 layers cannot fill 3 stages"),
        ("4.csv", None, "--partition best", "unknown partition method 'best'"),
        ("4.csv", None, "--partition 1,x,2", "--partition 1,x,2: give even, optimal, or the layers of each stage"),
        ("4.csv", None, "--partition 2,2", "(these: 2 numbers, sum 4)"),
        ("4.csv", None, "--partition 1,1,3", "add up to 4"),
        ("4.csv", None, "--partition 5,-2,1", "numbers of 1 or more"),
        ("4.csv", None, "--partition ,", "--partition ,: give even, optimal, or the layers of each stage"),
    ],
)
def test_cost_files_without_meaning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: bytes | None, flags: str, said: str
) -> None:
    if content is None:
        layers = [LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1)] * int(name[0])
        save_costs(layers, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    assert said in refused(capsys, "simulate", AFAB, f"--costs {tmp_path / name}", flags)


_FLAGS = [
    *("schedule", "ranks", "microbatches", "stages-per-rank", "from-csv", "forward-s", "backward-s", "costs", "json"),
    *("backward-input-s", "backward-weight-s", "output-bytes", "latency-s", "bytes-per-s", "overlap", "forward-only"),
    *("partition", "engine", "network", "nonsense", "slow-rank", "slow-link", "cores", "sharing", "dispatch-s"),
    "sharing-efficiency",
    *("receive-window", "jitter", "rank-jitter", "message-jitter", "hiccup-s", "hiccup-probability", "seed"),
]
_VALUES = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "nan",
    "inf",
    "1e999",
    "9" * 25,
    "afab",
    "gpipe",
    "even",
    "",
    ".",
    "2,1",
    "0=2",
    "0-1=2",
    "simpy",
    "é",
]
_pair = st.tuples(st.sampled_from(_FLAGS).map("--{}".format), st.sampled_from(_VALUES) | st.text(max_size=5)).map(
    lambda pair: list(pair[:1] if pair[0] in ("--json", "--forward-only") else pair)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["schedule", "simulate"]), st.booleans(), st.lists(_pair, max_size=6))
def test_any_words_give_an_answer_or_one_message(
    capsys: pytest.CaptureFixture[str], subcommand: str, with_base: bool, pairs: list[list[str]]
) -> None:
    base = [*AFAB.split(), *(COSTS.split() if subcommand == "simulate" else [])] if with_base else []
    words = [subcommand, *base, *(word for pair in pairs for word in pair)]
    code = main(words)
    out, err = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert out == ""
        assert err.startswith("ppsim: ")
        assert "Traceback" not in err
    elif "--json" in words:
        assert isinstance(json.loads(out), dict)
    else:
        assert out
