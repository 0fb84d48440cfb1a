"""`ppsim simulate`: the flags of the model and of jitter are `simulate`'s and `monte_carlo`'s options."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ppsim import Conditions, Jitter, Network, Reduction, StageCost, Trace, build_schedule, monte_carlo, simulate
from ppsim.cli.flags import flag_of
from tests.support.commandline import AFAB, COSTS, refused, run, run_json

SCHEDULE = build_schedule("afab", ranks=3, microbatches=4)
STAGES = [StageCost(forward_s=1, backward_input_s=0.75, backward_weight_s=0.5, output_bytes=100)] * 3
NETWORK = Network(latency_s=0.25, bytes_per_s=50)
WORDS = f"simulate {AFAB} {COSTS} --output-bytes 100 --latency-s 0.25 --bytes-per-s 50"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--slow-rank 2=1.5,0=1.25", {"slow_ranks": {2: 1.5, 0: 1.25}}),
        ("--dispatch-s 0.125", {"dispatch_s": 0.125}),
        ("--send-s 0.125", {"send_s": 0.125}),
        ("--receive-window 1", {"receive_window": 1}),
        ("--cores 1", {"cores": 1}),
        ("--cores 1 --sharing fair", {"cores": 1, "sharing": "fair"}),
        (
            "--cores 1 --sharing fair --sharing-efficiency 0.5",
            {"cores": 1, "sharing": "fair", "sharing_efficiency": 0.5},
        ),
        ("--devices 0,0,1", {"devices": [0, 0, 1]}),
        ("--sharing fair --speeds 1,0.5", {"sharing": "fair", "speeds": [1, 0.5]}),
        ("--scale 2", {"scale": 2.0}),
        ("--slow-link 0-1=3,1-0=2", {"network": NETWORK.slowed({(0, 1): 3, (1, 0): 2})}),
    ],
)
def test_every_flag_is_an_option_and_changes_the_step(
    capsys: pytest.CaptureFixture[str], flags: str, options: dict
) -> None:
    printed = run_json(capsys, WORDS, flags)
    trace = simulate(SCHEDULE, STAGES, **{"network": NETWORK, **options})
    assert printed["makespan_s"] == trace.makespan_s
    assert printed["makespan_s"] > simulate(SCHEDULE, STAGES, network=NETWORK).makespan_s
    assert printed["conditions"] == trace.conditions.to_dict()
    assert printed["details"] == trace.details


def test_every_option_has_a_flag_but_arrays_and_what_replicas_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Reductions, collectives and copies have flags of their own: --replicas, --active-stages, --offload-share, ..."""
    with_flags = {each.name for each in fields(Conditions)} - {
        "durations_s",
        "gradients_ready_s",
        "reduction",
        "collectives",
        "host_link",
    }
    _, out, _ = run(capsys, "simulate --help-all")
    assert {name for name in with_flags if flag_of(name) not in out} == set()


def test_samples_have_reductions(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--jitter 0.05 --replicas 2 --reduce-latency-s 1.5"
    printed = run_json(capsys, WORDS, flags)
    reduction = Reduction(replicas=2, latency_s=1.5)
    found = monte_carlo(SCHEDULE, STAGES, network=NETWORK, jitter=Jitter(action=0.05), reduction=reduction)
    assert printed["step_time_mean_s"] == found.mean_s > found.makespan_s.mean()


def test_samples_are_those_of_monte_carlo(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--jitter 0.05 --rank-jitter 0.02 --step-jitter 0.01 --message-jitter 0.3"
    hiccups = "--hiccup-probability 0.1 --hiccup-s 0.5 --seed 7 --slow-rank 1=1.5"
    printed = run_json(capsys, WORDS, flags, hiccups)
    jitter = Jitter(action=0.05, rank=0.02, step=0.01, message=0.3, hiccup_probability=0.1, hiccup_s=0.5)
    found = monte_carlo(SCHEDULE, STAGES, network=NETWORK, jitter=jitter, seed=7, slow_ranks={1: 1.5})
    assert printed["step_time_percentiles_s"] == found.percentiles_s
    assert list(printed["step_time_percentiles_s"]) == ["p5", "p50", "p95", "p99"]
    assert (printed["samples"], printed["seed"]) == (1000, 7)
    assert printed["step_time_mean_s"] == found.mean_s
    assert printed["jitter"] == jitter.to_dict()
    assert printed["makespan_s"] == simulate(SCHEDULE, STAGES, network=NETWORK, slow_ranks={1: 1.5}).makespan_s
    assert "samples" not in run_json(capsys, WORDS)


def test_samples_without_jitter_are_all_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ("--samples 10", "--samples 10 --engine simpy", "--samples 10 --cores 2"):
        printed = run_json(capsys, WORDS, flags)
        assert set(printed["step_time_percentiles_s"].values()) == {printed["makespan_s"]}
        assert printed["step_time_std_s"] == 0


def test_the_text_has_the_percentiles(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, WORDS, "--samples 10")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2].startswith("10 samples: step time (s)  p5 ")
    assert "standard deviation 0 s" in out


def test_the_trace_written_is_of_the_mean_costs(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    printed = run_json(capsys, WORDS, f"--jitter 0.1 --samples 5 --out {tmp_path}/t")
    assert Trace.load(tmp_path / "t").makespan_s == printed["makespan_s"]


def test_a_search_knows_slow_links(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"search --ranks 2 --microbatches 3 {COSTS} --output-bytes 1 --latency-s 0.5"
    assert run_json(capsys, words, "--slow-link 0-1=3")["makespan_s"] > run_json(capsys, words)["makespan_s"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--slow-rank 2", "must be ranks and factors, as in 2=1.5, got '2'"),
        ("--slow-rank 2=x", "must be ranks and factors"),
        ("--slow-rank 2=0", "must be ranks and factors"),
        ("--slow-rank 2=nan", "must be ranks and factors"),
        ("--slow-rank 1=2,1=3", "must be ranks and factors"),
        ("--slow-rank a=2", "must be ranks and factors"),
        ("--slow-rank 3=2", "slow_ranks has rank 3, but there are 3 ranks"),
        ("--slow-link 0=1", "--slow-link 0=1: give links and factors, as in 0-1=3"),
        ("--slow-link 0-1=inf", "give links and factors"),
        ("--slow-link 0-3=2", "0-3 is no link between the ranks 0 to 2"),
        ("--slow-link 1-1=2", "1-1 is no link between the ranks 0 to 2"),
        ("--dispatch-s -1", "--dispatch-s must be seconds"),
        ("--send-s -1", "--send-s must be seconds"),
        ("--cores 0", "cores must be a whole number of 1 or more, got 0"),
        ("--cores 2 --engine compiled", "use engine='simpy'"),
        ("--sharing fair", "sharing 'fair' is of ranks that share a device: give it with cores or devices"),
        ("--cores 1 --sharing-efficiency 0.5", "give it with sharing 'fair'"),
        (
            "--cores 1 --sharing fair --sharing-efficiency 2",
            "--sharing-efficiency must be above 0 and at most 1, got 2",
        ),
        ("--receive-window 0", "--receive-window must be a whole number of 1 or more, got 0"),
        ("--jitter -1", "--jitter must be a relative standard deviation from 0 to 100, got -1.0"),
        ("--jitter 1e300", "--jitter must be a relative standard deviation from 0 to 100, got 1e+300"),
        ("--message-jitter nan", "--message-jitter must be"),
        ("--hiccup-probability 2 --hiccup-s 1", "--hiccup-probability must be from 0 to 1, got 2.0"),
        ("--hiccup-s 1", "--hiccup-s is one half of what hiccups are: give --hiccup-probability with it"),
        ("--hiccup-probability 1", "give --hiccup-s with it"),
        ("--samples 0", "--samples must be from 1 to 33333333 for this schedule, got 0"),
        ("--samples 100000000000", "--samples must be from 1 to 33333333 for this schedule, got 100000000000"),
        ("--seed 3", "--seed is what samples are drawn from: give it with --jitter or --samples"),
        ("--samples 3 --seed -3", "--seed must be 0 or more, got -3"),
    ],
)
def test_flags_without_meaning(capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    assert said in refused(capsys, WORDS, flags)
