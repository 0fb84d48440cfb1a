"""Examples: every command has one, its help shows it, and it does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import webbrowser
from pathlib import Path
from typing import NoReturn

import pytest

from ppsim.cli.examples import EXAMPLES
from ppsim.cli.main import COMMANDS, main
from ppsim.explorer.server import ExplorerServer

_STEP_COLUMNS = "global_batch,micro_batch_size,hidden,heads,layers,seq,tp,dp,pp,step_s"
_STEPS = [
    f"16,{b},1024,16,{layers},1024,{tp},1,{pp},{0.1 * layers / tp / pp}"
    for b in (2, 4)
    for layers in (8, 16)
    for tp in (1, 2)
    for pp in (1, 2)
]


def test_ppsim_alone_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in COMMANDS:
        assert f"ppsim {name}" in out
    assert max(map(len, out.splitlines())) <= 110


def test_every_command_has_an_example_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(EXAMPLES) == set(COMMANDS)
    for name, (_, line) in EXAMPLES.items():
        assert main([name, "--help"]) == 0
        assert f"Example: {line}" in " ".join(capsys.readouterr().out.split())
    assert main(["--help"]) == 0
    assert "Example:" not in capsys.readouterr().out


def _interrupted(server: ExplorerServer) -> NoReturn:
    raise KeyboardInterrupt


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another: later ones use what earlier ones write. A user has the measured run and steps."""
    monkeypatch.chdir(tmp_path)
    Path("steps.csv").write_text("\n".join([_STEP_COLUMNS, *_STEPS]))
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(ExplorerServer, "serve_forever", _interrupted)
    for name, (_, line) in EXAMPLES.items():
        if name == "import":
            Path("run").mkdir()
            shutil.copy("step.trace", "run/step_0.trace")
        program, *words = line.split()
        assert program == "ppsim"
        assert main(words) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    assert opened[0].startswith("http://127.0.0.1:")
    assert opened[0].endswith("/#schedule=zb-h1&ranks=4&microbatches=8")
    assert Path("order.csv").read_text().count("\n") == 4
    assert Path("costs.json").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("explore", "simulate", "microbatches"):
        assert word in script


@pytest.mark.parametrize("words", [[], ["ksh"], ["bash", "zsh"]])
def test_other_shells_have_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", *words]) == 2
    assert capsys.readouterr().err == "ppsim: --print-completion takes the name of your shell: bash, zsh, fish\n"


_COMPLETE = """
eval "$SCRIPT"
function=$(complete -p ppsim | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
"$function"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """Cause of a bug: a help of several lines became several words, so that --str was completed to a sentence."""
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", _COMPLETE, "bash", *words],
            env={**os.environ, "SCRIPT": script},
            capture_output=True,
            text=True,
            check=True,
        )
        return sorted(done.stdout.split("\n")[:-1])

    assert completed("ppsim", "s") == ["schedule", "search", "simulate"]
    assert completed("ppsim", "simulate", "--mic") == ["--microbatch-group", "--microbatches"]
    assert completed("ppsim", "simulate", "--he") == ["--help", "--help-all"]
    assert completed("ppsim", "simulate", "--str") == ["--streams"]
    assert completed("ppsim", "simulate", "--streams", "") == ["link", "pair", "rank"]


def test_short_help_has_what_most_uses_need(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        brief = capsys.readouterr().out
        assert main([name, "--help-all"]) == 0
        everything = capsys.readouterr().out
        shown, known = (set(re.findall(r"--[a-z][a-z-]+", text)) for text in (brief, everything))
        assert brief.count("\n") <= everything.count("\n")
        assert ("--help-all" in brief) == (known - shown != set())
    assert main(["simulate", "--help"]) == 0
    brief = capsys.readouterr().out
    assert all(flag in brief for flag in ("--schedule", "--ranks", "--forward-s", "--latency-s", "--json"))
    assert all(flag not in brief for flag in ("--jitter FLOAT", "--replicas", "--overlap", "--layout"))
    assert main(["simulate", "--schedule", "none", "--help-all"]) == 0  # wherever it stands
    everything = capsys.readouterr().out
    for group in ("schedule", "cost", "network", "conditions", "jitter", "reduction", "simulate"):
        assert f"{group} options" in everything
