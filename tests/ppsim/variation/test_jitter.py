"""Jitter: moments of what is drawn, against the log-normal's and the exponential's own; what cannot be is refused.

Seeds are fixed, and bounds are five standard errors or more, so nothing here fails by chance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppsim import Conditions, Jitter, Kind, Network, Schedule, StageCost, build_schedule
from ppsim.simulation.timed_program import TimedProgram
from ppsim.variation.sample_times import SampleTimes

COST = StageCost(forward_s=2.0, backward_input_s=1.0, backward_weight_s=1.0, output_bytes=8)
NETWORK = Network(latency_s=0.5, bytes_per_s=16)


def load(ranks: int = 4, microbatches: int = 25) -> TimedProgram:
    schedule = build_schedule("1f1b", ranks=ranks, microbatches=microbatches)
    return TimedProgram.of(schedule.program, [COST] * ranks, NETWORK)


def samples(times: SampleTimes, count: int) -> list[np.ndarray]:
    """The first samples' durations, message times and dispatches."""
    blocks = [times.block(index) for index in range(-(-count // times.block_size))]
    durations_s, dispatch_s, occupied_s, latency_s = (
        np.concatenate(each)[:count] for each in zip(*blocks, strict=True)
    )
    return [durations_s, occupied_s, latency_s, dispatch_s]


def drawn(jitter: Jitter, count: int = 400, **calm: frozenset[int]) -> np.ndarray:
    """Factors on durations, shape (count, rows)."""
    base = load()
    return samples(SampleTimes(timed=base, jitter=jitter, seed=3, **calm), count)[0] / base.duration_s


@pytest.mark.parametrize("relative", [0.05, 0.3, 1.0])
def test_factors_of_actions_have_mean_one_and_their_relative_deviation(relative: float) -> None:
    factors = drawn(Jitter(action=relative)).ravel()
    error = relative / math.sqrt(len(factors))
    assert factors.mean() == pytest.approx(1, abs=5 * error)
    logs = np.log(factors)  # normal, and so are their moments' errors
    deviation = math.sqrt(math.log(1 + relative**2))
    assert logs.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(logs)))
    assert logs.mean() == pytest.approx(-(deviation**2) / 2, abs=5 * deviation / math.sqrt(len(logs)))
    assert abs(((logs - logs.mean()) ** 3).mean()) < 5 * math.sqrt(15 / len(logs)) * deviation**3


def test_actions_are_independent_of_one_another() -> None:
    logs = np.log(drawn(Jitter(action=0.1)))
    correlation = np.corrcoef(logs[:, :40].T) - np.eye(40)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(logs))


def test_a_rank_has_one_factor_in_a_step_and_a_step_one_for_all() -> None:
    ranks = load().program.rank
    factors = drawn(Jitter(rank=0.2))
    for rank in range(4):
        own = factors[:, ranks == rank]
        assert own == pytest.approx(np.repeat(own[:, :1], own.shape[1], axis=1))
    by_rank = np.log(factors[:, [np.flatnonzero(ranks == rank)[0] for rank in range(4)]])
    assert np.abs(np.corrcoef(by_rank.T) - np.eye(4)).max() < 5 / math.sqrt(400)
    assert by_rank.std() == pytest.approx(math.sqrt(math.log(1.04)), rel=5 / math.sqrt(2 * by_rank.size))
    common = drawn(Jitter(step=0.2))
    assert common == pytest.approx(np.repeat(common[:, :1], common.shape[1], axis=1))
    assert len(np.unique(common[:, 0])) == 400


def test_kinds_of_jitter_multiply_and_change_nothing_of_each_others_draws() -> None:
    apart = [drawn(jitter) for jitter in (Jitter(action=0.1), Jitter(rank=0.05), Jitter(step=0.02))]
    assert drawn(Jitter(action=0.1, rank=0.05, step=0.02)) == pytest.approx(np.prod(apart, axis=0))


def test_messages_vary_in_all_they_take() -> None:
    base = load()
    _, occupied_s, latency_s, _ = samples(SampleTimes(timed=base, jitter=Jitter(message=0.3), seed=0), 300)
    assert occupied_s / base.occupied_s == pytest.approx(latency_s / base.latency_s)
    factors = occupied_s / base.occupied_s
    assert factors.mean() == pytest.approx(1, abs=5 * 0.3 / math.sqrt(factors.size))
    assert np.log(factors).std() == pytest.approx(math.sqrt(math.log(1.09)), rel=5 / math.sqrt(2 * factors.size))


def test_hiccups_come_as_often_and_last_as_long_as_said() -> None:
    base = load()
    jitter = Jitter(hiccup_probability=0.01, hiccup_s=3.0)
    durations_s = samples(SampleTimes(timed=base, jitter=jitter, seed=1), 1000)[0]
    pauses_s = (durations_s - base.duration_s).ravel()
    struck = pauses_s > 0
    error = math.sqrt(0.01 * 0.99 / struck.size)
    assert struck.mean() == pytest.approx(0.01, abs=5 * error)
    lengths_s = pauses_s[struck]
    assert lengths_s.mean() == pytest.approx(3.0, abs=5 * 3.0 / math.sqrt(struck.sum()))
    assert lengths_s.var() == pytest.approx(9.0, abs=5 * 9 * math.sqrt(8 / struck.sum()))  # kurtosis 9


def test_a_pair_is_one_action() -> None:
    schedule = Schedule.of([["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"]])
    base = TimedProgram.of(schedule.program, [COST], Network())
    jitter = Jitter(action=0.2, hiccup_probability=1.0, hiccup_s=1.0)
    factors = samples(SampleTimes(timed=base, jitter=Jitter(action=0.2), seed=0), 9)[0] / base.duration_s
    assert factors[:, 2].tolist() == pytest.approx(factors[:, 3].tolist())
    assert len(np.unique(factors[0].round(12))) == 5
    pauses_s = samples(SampleTimes(timed=base, jitter=jitter, seed=0), 9)[0] - factors * base.duration_s
    assert (pauses_s[:, 2] == 0).all()
    assert (np.delete(pauses_s, 2, axis=1) > 0).all()


def test_calm_ranks_and_links_keep_their_times_and_others_keep_their_draws() -> None:
    base = load()
    jitter = Jitter(action=0.1, rank=0.1, message=0.1, hiccup_probability=0.1, hiccup_s=1.0)
    all_s = samples(SampleTimes(timed=base, jitter=jitter, seed=5), 20)
    some_s = samples(
        SampleTimes(timed=base, jitter=jitter, seed=5, calm_ranks=frozenset({1, 2}), calm_links=frozenset({0})), 20
    )
    calm = np.isin(base.program.rank, [1, 2])
    assert (some_s[0][:, calm] == base.duration_s[calm]).all()
    assert (some_s[0][:, ~calm] == all_s[0][:, ~calm]).all()
    of_link = base.program.messages.link == 0
    for varied_s, whole_s, mean_s in ((some_s[1], all_s[1], base.occupied_s), (some_s[2], all_s[2], base.latency_s)):
        assert (varied_s[:, of_link] == mean_s[of_link]).all()
        assert (varied_s[:, ~of_link] == whole_s[:, ~of_link]).all()


def test_a_sample_is_the_same_alone_and_in_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    jitter = Jitter(action=0.1, rank=0.1, step=0.1, message=0.1, hiccup_probability=0.1, hiccup_s=1.0)
    base = load()
    monkeypatch.setattr("ppsim.variation.sample_times._BLOCK_ROWS", 3 * len(base.duration_s))
    times = SampleTimes(timed=base, jitter=jitter, seed=9)
    whole = samples(times, 7)
    assert times.block_size == 3
    for index in range(7):
        alone = times.sample(index)
        assert alone.duration_s.tolist() == whole[0][index].tolist()
        assert alone.occupied_s.tolist() == whole[1][index].tolist()
        assert alone.latency_s.tolist() == whole[2][index].tolist()
    assert len(np.unique(whole[0][:, 0])) == len(np.unique(whole[1][:, 0])) == 7
    other = samples(SampleTimes(timed=base, jitter=jitter, seed=10), 7)
    assert not np.isin(other[0], whole[0]).any()


def test_measured_lateness_prolongs_and_other_factors_are_of_dispatches_and_messages() -> None:
    schedule = build_schedule("1f1b", ranks=4, microbatches=25)
    base = TimedProgram.of(schedule.program, [COST] * 4, NETWORK, Conditions(dispatch_s=0.5))
    jitter = Jitter(late_s=[0.0, 3.0], factors={"dispatch": np.array([0.5, 1.5]), "message": np.array([0.0, 2.0])})
    durations_s, occupied_s, latency_s, dispatch_s = samples(SampleTimes(timed=base, jitter=jitter, seed=3), 300)
    assert np.unique(durations_s - base.duration_s).tolist() == [0.0, 3.0]
    assert np.unique(dispatch_s).tolist() == [0.25, 0.75]
    assert np.unique(occupied_s).tolist() == [0.0, 1.0]
    assert (latency_s == occupied_s * (base.latency_s / base.occupied_s)).all()
    for drawn, least, most in ((durations_s - base.duration_s, 0.0, 3.0), (dispatch_s, 0.25, 0.75), (occupied_s, 0, 1)):
        share = ((drawn - least) / (most - least)).mean()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(drawn.size))
    calm = SampleTimes(timed=base, jitter=jitter, seed=3, calm_ranks=frozenset({1}), calm_links=frozenset({0}))
    some_s = samples(calm, 300)
    is_calm, of_link = base.program.rank == 1, base.program.messages.link == 0
    assert (some_s[0][:, is_calm] == base.duration_s[is_calm]).all()
    assert (some_s[0][:, ~is_calm] == durations_s[:, ~is_calm]).all()
    assert (some_s[1][:, of_link] == base.occupied_s[of_link]).all()
    assert (some_s[1][:, ~of_link] == occupied_s[:, ~of_link]).all()
    assert (some_s[3][:, is_calm] == 0.5).all()  # without pairs rows are actions


def test_lateness_must_be_seconds() -> None:
    for late_s in ([-1.0], [math.inf], [[1.0]], 1.0):
        with pytest.raises(ValueError, match="late_s must be a list of seconds, finite and >= 0"):
            Jitter(late_s=late_s)
    assert Jitter(late_s=[0.0]).is_calm
    assert not Jitter(late_s=[1.0, 2.0]).is_calm
    assert Jitter(late_s=[1.0, 2.0]).to_dict() == {"late_s": {"count": 2, "mean": 1.5}}


class TestFromSamples:
    def test_draws_what_was_measured_relative_to_its_mean(self) -> None:
        jitter = Jitter.from_samples({"F": [1.0, 1.0, 4.0], "B": [7.0]}, rank=0.0)
        factors = drawn(jitter)
        is_forward = load().program.kind == Kind.F
        assert np.unique(factors[:, is_forward]).tolist() == [0.5, 2.0]
        assert (factors[:, ~is_forward] == 1).all()
        share = (factors[:, is_forward] == 2.0).mean()
        assert share == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / is_forward.sum() / 400))

    def test_kinds_without_samples_are_log_normal(self) -> None:
        factors = drawn(Jitter.from_samples({"F": [1.0, 3.0]}, action=0.1))
        backward = factors[:, load().program.kind == Kind.B]
        assert np.log(backward).std() == pytest.approx(math.sqrt(math.log(1.01)), rel=5 / math.sqrt(2 * backward.size))

    @pytest.mark.parametrize(
        ("samples", "said"),
        [
            ({"X": [1.0]}, "unknown kind 'X'"),
            ({"SEND_F": [1.0]}, "unknown kind 'SEND_F': jitter has the kinds F, B, I, W"),
            ({"F": []}, "give a list of one or more"),
            ({"F": [[1.0]]}, r"the samples of F have shape \(1, 1\)"),
            ({"F": [1.0, -1.0]}, "finite and >= 0"),
            ({"F": [math.nan]}, "finite and >= 0"),
            ({"F": [0.0, 0.0]}, "are all 0"),
        ],
    )
    def test_what_is_no_duration_is_refused(self, samples: dict, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            Jitter.from_samples(samples)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"action": -0.1}, "action must be a relative standard deviation from 0 to 100, got -0.1"),
        ({"action": 1e300}, "from 0 to 100, got 1e[+]300"),  # cause of a bug: its square is no float
        ({"rank": math.nan}, "rank must be"),
        ({"step": math.inf}, "step must be"),
        ({"message": True}, "message must be"),
        ({"hiccup_probability": 1.5}, "hiccup_probability must be from 0 to 1, got 1.5"),
        ({"hiccup_s": -1.0}, "hiccup_s must be seconds"),
    ],
)
def test_numbers_without_meaning_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Jitter(**fields)


def test_calm_is_what_does_not_vary() -> None:
    assert Jitter().is_calm
    assert Jitter(hiccup_probability=0.5).is_calm
    assert not Jitter(step=0.1).is_calm
    assert not Jitter.from_samples({"F": [1.0, 2.0]}).is_calm
    described = Jitter.from_samples({"F": [1.0, 3.0]}, action=0.1).to_dict()
    assert described == {"action": 0.1, "factors": {"F": {"count": 2, "relative_std": 0.5}}}
