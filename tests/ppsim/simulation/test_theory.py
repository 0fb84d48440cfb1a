"""The model against the closed forms: `published/formulas.json`, row by row, over grids."""

from __future__ import annotations

import pytest

from ppsim import Network, StageCost, build_schedule, simulate
from ppsim.simulation import theory

ALL_RANKS = (1, 2, 3, 4, 8)


def step(
    name, ranks, microbatches, times, *, latency_s=0.0, stages_per_rank=None, whole=1, kept=1, overlap=1.0
):  # fmt: skip
    """A trace with equal stages; `times`: F, I, W of a whole rank; `whole`, `kept`: bytes of one stage."""
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank)
    v = schedule.stages // ranks
    f, i, w = (seconds / v for seconds in times)
    cost = StageCost(
        forward_s=f, backward_input_s=i, backward_weight_s=w, activation_bytes=whole, weight_activation_bytes=kept
    )
    return simulate(schedule, [cost] * schedule.stages, network=Network(latency_s=latency_s), overlap=overlap)


def close(seconds):
    """Equal but for the rounding of sums in another sequence."""
    return pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize("microbatches", [1, 3, 8, 16])
@pytest.mark.parametrize("latency_s", [0, 0.25])
def test_afab(ranks, microbatches, latency_s):
    trace = step("afab", ranks, microbatches, (1, 2, 1), latency_s=latency_s)
    times = {"forward_s": 1, "backward_s": 3, "latency_s": latency_s}
    assert trace.makespan_s == theory.afab_makespan_s(ranks=ranks, microbatches=microbatches, **times)
    held = theory.afab_peak_activations(microbatches=microbatches)
    assert trace.peak_activation_bytes.tolist() == [held] * ranks
    if latency_s == 0:
        assert trace.bubble_fraction == close(theory.afab_bubble_fraction(ranks=ranks, microbatches=microbatches))


@pytest.mark.parametrize("ranks", ALL_RANKS)
def test_the_m_that_halves_afab_s_bubble(ranks):
    more = theory.microbatches_for_half_bubble(ranks=ranks, microbatches=8)
    wanted = theory.afab_bubble_fraction(ranks=ranks, microbatches=8) / 2
    assert theory.afab_bubble_fraction(ranks=ranks, microbatches=more) == close(wanted)


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize("microbatches", [1, 3, 8, 17])
def test_1f1b(ranks, microbatches):
    """Also with m < p, where AFAB and 1F1B take the same time."""
    trace = step("1f1b", ranks, microbatches, (1, 2, 1))
    wanted = theory.one_f_one_b_makespan_s(ranks=ranks, microbatches=microbatches, forward_s=1, backward_s=3)
    assert trace.makespan_s == wanted
    assert trace.bubble_fraction == close(theory.afab_bubble_fraction(ranks=ranks, microbatches=microbatches))
    assert trace.peak_activation_bytes.tolist() == [
        theory.one_f_one_b_peak_activations(ranks=ranks, microbatches=microbatches, stage=stage)
        for stage in range(ranks)
    ]


@pytest.mark.parametrize("ranks", range(2, 17))
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("latency_s", [0.01, 0.25])
def test_1f1b_with_latency(ranks, rounds, latency_s):
    trace = step("1f1b", ranks, ranks * rounds, (1, 1, 1), latency_s=latency_s)
    times = {"forward_s": 1, "backward_s": 2, "latency_s": latency_s}
    wanted = theory.one_f_one_b_makespan_s(ranks=ranks, microbatches=ranks * rounds, **times)
    assert trace.makespan_s == close(wanted)


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("times", [(1, 1, 1), (2, 0.5, 0.5), (1, 2, 1)])
def test_eager_1f1b_hides_messages_of_up_to_half_a_forward_and_backward(ranks, times):
    """(m + p - 1)(F + B) + 2 (p - 1) c up to c = (F + B) / 2, and longer beyond; peaks min(m, 2 (p - r) - 1)."""
    microbatches, whole_s = 4 * ranks, sum(times)
    for latency_s, is_hidden in ((0.0, True), (whole_s / 4, True), (whole_s / 2, True), (whole_s / 2 + 0.25, False)):
        trace = step("1f1b-eager", ranks, microbatches, times, latency_s=latency_s)
        bound_s = (microbatches + ranks - 1) * whole_s + 2 * (ranks - 1) * latency_s
        assert (trace.makespan_s == close(bound_s)) == is_hidden
        assert trace.makespan_s >= bound_s - 1e-9
    assert trace.peak_activation_bytes.tolist() == [2 * (ranks - rank) - 1 for rank in range(ranks)]


def test_1f1b_with_latency_has_no_closed_form_for_an_incomplete_round():
    with pytest.raises(ValueError, match="got m=9, p=4: take m=8"):
        theory.one_f_one_b_makespan_s(ranks=4, microbatches=9, forward_s=1, backward_s=2, latency_s=0.1)


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize("times", [(1, 1, 1), (3, 1, 0.5)])
def test_interleaved_1f1b(ranks, rounds, v, times):
    numbers = {"ranks": ranks, "microbatches": ranks * rounds, "stages_per_rank": v}
    trace = step("interleaved-1f1b", ranks, ranks * rounds, times, stages_per_rank=v)
    wanted = theory.interleaved_1f1b_makespan_s(forward_s=times[0], backward_s=times[1] + times[2], **numbers)
    assert trace.makespan_s == close(wanted)
    assert trace.peak_activation_bytes[0] / v == close(theory.interleaved_1f1b_peak_activations(**numbers))
    assert trace.peak_activation_bytes[0] == trace.peak_activation_bytes.max()


SPLITS = [(1, 1, 1), (2, 1, 0.5), (1, 2, 1), (1, 1, 0.25)]  # W <= F and W <= I


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize("times", SPLITS)
def test_zb_h1(ranks, times):
    """Without communication already for m >= p; with a little, from m = 2p."""
    for microbatches in (ranks, 2 * ranks, 3 * ranks + 1):
        for latency_s in (0, 1 / 32) if microbatches > ranks else (0,):
            trace = step("zb-h1", ranks, microbatches, times, latency_s=latency_s, whole=10, kept=3)
            wanted = theory.zb_h1_makespan_s(
                ranks=ranks,
                microbatches=microbatches,
                forward_s=times[0],
                backward_input_s=times[1],
                backward_weight_s=times[2],
                latency_s=latency_s,
            )
            assert trace.makespan_s == close(wanted)
            assert trace.peak_activation_bytes.tolist() == [
                theory.zb_h1_peak_activation_bytes(
                    ranks=ranks, stage=stage, activation_bytes=10, weight_activation_bytes=3
                )
                for stage in range(ranks)
            ]


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize("times", SPLITS)
def test_zb_h2(ranks, times):
    for microbatches in (2 * ranks - 1, 2 * ranks, 3 * ranks + 1):
        for latency_s in (0, 1 / 32):
            trace = step("zb-h2", ranks, microbatches, times, latency_s=latency_s, whole=10, kept=3)
            wanted = theory.zb_h2_rank_time_s(
                ranks=ranks,
                microbatches=microbatches,
                forward_s=times[0],
                backward_input_s=times[1],
                backward_weight_s=times[2],
                latency_s=latency_s,
            )
            assert trace.rank_time_s.max() == close(wanted)
            held = theory.zb_h2_peak_activations(ranks=ranks)
            assert trace.peak_activation_bytes[0] == trace.peak_activation_bytes.max() == held * 10


@pytest.mark.parametrize("ranks", ALL_RANKS)
def test_zb_v(ranks):
    for microbatches in (2 * ranks, 3 * ranks + 1, 4 * ranks):
        trace = step("zb-v", ranks, microbatches, (2, 2, 2))
        assert trace.rank_time_s.tolist() == [6 * microbatches] * ranks
        assert trace.peak_activation_bytes.tolist() == [2 * theory.zb_v_peak_activations(ranks=ranks)] * ranks


@pytest.mark.parametrize("ranks", [*range(1, 14), 24, 32])
def test_v_half(ranks):
    """Every rank reaches the formula, whatever W still needs; the bubble is about half of 1F1B's 6 (p - 1)."""
    microbatches = 3 * ranks
    held = [2 * theory.v_half_peak_activations(ranks=ranks)] * ranks
    for kept in (0, 1):
        trace = step("v-half", ranks, microbatches, (2, 2, 2), kept=kept)
        assert trace.peak_activation_bytes.tolist() == held
    assert trace.rank_time_s.max() - 6 * microbatches <= 3 * ranks - 2


@pytest.mark.parametrize("ranks", [*range(1, 14), 24, 32])
def test_v_min(ranks):
    """The fullest rank reaches the formula if activations are held until W; none exceeds it. Bubble: 4p or less."""
    microbatches = 3 * ranks
    held = 2 * theory.v_min_peak_activations(ranks=ranks)
    trace = step("v-min", ranks, microbatches, (2, 2, 2))
    assert trace.peak_activation_bytes.max() == held
    assert trace.rank_time_s.max() - 6 * microbatches <= max(0, 4 * ranks - 3)
    trace = step("v-min", ranks, microbatches, (2, 2, 2), kept=0)
    assert trace.peak_activation_bytes.max() <= held


def dualpipe_v(ranks, microbatches, stage_times, overlap):
    """The longest bubble of a rank, and what theory says; `stage_times`: F, I, W of one stage."""
    f, i, w = stage_times
    trace = step("dualpipe-v", ranks, microbatches, (2 * f, 2 * i, 2 * w), overlap=overlap)
    wanted = theory.dualpipe_v_bubble_s(
        ranks=ranks, pair_s=overlap * (f + i + w), backward_s=i + w, backward_weight_s=w
    )
    return trace, wanted


@pytest.mark.parametrize("ranks", ALL_RANKS)
@pytest.mark.parametrize(
    ("stage_times", "overlap"),
    [((1, 1, 1), 1), ((1, 1, 1), 0.75), ((1, 1, 0.5), 1), ((1, 1, 0.5), 0.75), ((2, 2, 1), 0.625)],
)
def test_dualpipe_v(ranks, stage_times, overlap):
    """Holds for F = I, W <= F and FB >= B, as the bubble of the rank that idles longest (rank 0)."""
    for microbatches in (2 * ranks, 3 * ranks + 1, 4 * ranks):
        trace, wanted = dualpipe_v(ranks, microbatches, stage_times, overlap)
        assert trace.bubble_s.max() == close(wanted)
        held = theory.dualpipe_v_peak_activations(ranks=ranks)
        assert trace.peak_activation_bytes.tolist() == [held] * ranks


@pytest.mark.parametrize(
    ("stage_times", "overlap", "is_longer"),
    [((1, 1.5, 0.5), 1, False), ((1, 0.75, 1.25), 1, True), ((1, 2, 2), 1, False), ((1, 1, 1), 0.5, True)],
)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_dualpipe_v_s_formula_does_not_hold_elsewhere(ranks, stage_times, overlap, is_longer):
    """F and I unequal, W > F, or FB < B: the same orders, so PyTorch's and DeepSeek's, idle longer or shorter."""
    trace, formula = dualpipe_v(ranks, 4 * ranks, stage_times, overlap)
    assert (trace.bubble_s.max() > formula + 0.1) == is_longer
    assert (trace.bubble_s.max() < formula - 0.1) != is_longer


def dualpipe(ranks, microbatches, stage_times, overlap):
    """A trace of DualPipe and what its authors' table says; stage_times: F, I, W of one stage."""
    f, i, w = stage_times
    trace = step("dualpipe", ranks, microbatches, (2 * f, 2 * i, 2 * w), overlap=overlap)
    wanted = theory.dualpipe_bubble_s(ranks=ranks, pair_s=overlap * (f + i + w), backward_s=i + w, backward_weight_s=w)
    return trace, wanted


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 16])
@pytest.mark.parametrize(
    ("stage_times", "overlap"), [((1, 1, 1), 1.0), ((2, 2, 1), 1.0), ((1, 1, 0.5), 0.9), ((4, 4, 3), 0.875)]
)
def test_dualpipe(ranks, stage_times, overlap):
    """DeepSeek-V3's table 2: (PP/2 - 1)(F&B + B - 3W), parameters twice, PP + 1 activations."""
    for microbatches in (2 * ranks, 3 * ranks, 5 * ranks + 2):
        trace, wanted = dualpipe(ranks, microbatches, stage_times, overlap)
        assert trace.bubble_s.max() == close(wanted)
        if overlap == 1:
            assert trace.bubble_s.tolist() == close([wanted] * ranks)
        assert trace.peak_activation_bytes.tolist() == [theory.dualpipe_peak_activations(ranks=ranks)] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dualpipe_holds_the_parameters_twice(ranks):
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=7)
    both = simulate(build_schedule("dualpipe", ranks=ranks, microbatches=2 * ranks), [cost] * ranks)
    one = simulate(build_schedule("1f1b", ranks=ranks, microbatches=2 * ranks), [cost] * ranks)
    assert both.parameter_bytes.tolist() == (2 * one.parameter_bytes).tolist() == [14] * ranks


def test_dualpipe_s_bubble_is_smaller_than_those_beside_it_in_the_table():
    """Of 8 ranks and 20 microbatches, as in their figure: 1F1B (PP - 1)(F + B), ZB1P (PP - 1)(F + B - 2W)."""
    f, i, w = 1, 1, 1
    idle = {}
    for name in ("1f1b", "zb-h1", "dualpipe"):
        schedule = build_schedule(name, ranks=8, microbatches=20)
        cost = StageCost(forward_s=f, backward_input_s=i, backward_weight_s=w)
        idle[name] = float(simulate(schedule, [cost] * 8).bubble_s.max())
    assert idle == {"1f1b": 7 * 3, "zb-h1": 7 * 1, "dualpipe": 3 * (3 + 2 - 3)}


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 16])
@pytest.mark.parametrize(("forward_s", "backward_s"), [(1, 1), (1, 2), (1, 1.5), (1, 3), (1, 5), (2, 1), (3, 2)])
def test_chimera(ranks, forward_s, backward_s):
    """Also where forwards take longer than backwards, with whole units."""
    for units in (1, 2, 3, 6):
        times = (2 * forward_s, backward_s, backward_s)  # of a rank, whose stages take half
        trace = step("chimera", ranks, units * ranks, times)
        wanted = theory.chimera_bubble_s(
            ranks=ranks, microbatches=units * ranks, forward_s=forward_s, backward_s=backward_s
        )
        assert trace.bubble_s.tolist() == pytest.approx([wanted] * ranks, abs=1e-9)
        assert trace.peak_activation_bytes.tolist() == [
            theory.chimera_peak_activations(ranks=ranks, rank=rank) for rank in range(ranks)
        ]


@pytest.mark.parametrize("depth", [2, 4, 8, 16, 32])
def test_chimera_s_published_table(depth):
    """Bubble ratio (D - 2)/(2N + D - 2) with F = B, and activations from D/2 + 1 to D (table 2)."""
    for units in (1, 2, 4):
        trace = step("chimera", depth, units * depth, (2, 1, 1))
        assert trace.bubble_fraction == close((depth - 2) / (2 * units * depth + depth - 2))
        assert trace.peak_activation_bytes.min() == depth // 2 + 1
        assert trace.peak_activation_bytes.max() == depth


def test_chimera_s_critical_path_of_six_ranks():
    """Their figure 6: D = N = 6 takes 6 forwards and 10 backwards."""
    for forward_s, backward_s in ((1, 1), (1, 2), (3, 4)):
        trace = step("chimera", 6, 6, (2 * forward_s, backward_s, backward_s))
        assert trace.makespan_s == close(6 * forward_s + 10 * backward_s)


def test_chimera_s_bubble_has_no_closed_form_for_other_numbers():
    with pytest.raises(ValueError, match="m a multiple of p, got m=7, p=4: take m=4 or simulate"):
        theory.chimera_bubble_s(ranks=4, microbatches=7, forward_s=1, backward_s=2)
