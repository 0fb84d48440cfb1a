"""Theory: closed forms for equal stages, against which the model is tested.

Parameters are named alike throughout. ranks: p. microbatches: m. stages_per_rank: v. forward_s, backward_s,
backward_input_s, backward_weight_s: seconds of F, B, I and W of one microbatch on one stage, unless said otherwise.
latency_s: c, seconds of one message, which does not occupy its link. Results are seconds (`_s`), bytes (`_bytes`), or
numbers of microbatches whose activations are held at once (`_peak_activations`).
"""

from __future__ import annotations

from ppsim.errors import InputError


def afab_makespan_s(
    *, ranks: int, microbatches: int, forward_s: float, backward_s: float, latency_s: float = 0.0
) -> float:
    """AFAB's step: (m + p - 1)(F + B) + 2 (p - 1) c.

    Notes
    -----
    Huang et al., GPipe, 2019, section 2.3. It holds for `afab-eager` with c = 0 as well.
    """
    return (microbatches + ranks - 1) * (forward_s + backward_s) + 2 * (ranks - 1) * latency_s


def afab_bubble_fraction(*, ranks: int, microbatches: int) -> float:
    """Idle share of AFAB and 1F1B without communication: (p - 1) / (m + p - 1)."""
    return (ranks - 1) / (microbatches + ranks - 1)


def microbatches_for_half_bubble(*, ranks: int, microbatches: int) -> int:
    """The m that halves `afab_bubble_fraction`: 2 m + p - 1. With one rank there is no bubble: m."""
    return microbatches if ranks == 1 else 2 * microbatches + ranks - 1


def afab_peak_activations(*, microbatches: int) -> int:
    """Microbatches held at once on every rank under AFAB: m."""
    return microbatches


def one_f_one_b_makespan_s(
    *, ranks: int, microbatches: int, forward_s: float, backward_s: float, latency_s: float = 0.0
) -> float:
    """1F1B's step: (m + p - 1)(F + B), with latency c longer by 2 c ((p - 1)(m / p + 1) - 1).

    Raises
    ------
    InputError
        For a latency where m is no multiple of p.

    Notes
    -----
    Narayanan et al., SC 2021, section 2.2.1. The part of c was found by evaluation, for p >= 2, m a multiple of p, and
    c small against F and B: in every round of p microbatches the forward of one and the backward of another meet, and
    each hop is waited for.
    """
    step_s = (microbatches + ranks - 1) * (forward_s + backward_s)
    if latency_s == 0 or ranks == 1:
        return step_s
    if microbatches % ranks:
        raise InputError(
            f"1F1B with latency has a closed form for m a multiple of p, got m={microbatches}, p={ranks}: "
            f"take m={microbatches // ranks * ranks or ranks} or simulate"
        )
    return step_s + 2 * latency_s * ((ranks - 1) * (microbatches // ranks + 1) - 1)


def one_f_one_b_peak_activations(*, ranks: int, microbatches: int, stage: int) -> int:
    """Microbatches held at once on a stage, counted from 0, under 1F1B: min(m, p - stage).

    Notes
    -----
    Narayanan et al., SC 2021.
    """
    return min(microbatches, ranks - stage)


def interleaved_1f1b_makespan_s(
    *, ranks: int, microbatches: int, stages_per_rank: int, forward_s: float, backward_s: float
) -> float:
    """Interleaved 1F1B's step: m (F + B) + (p - 1)(F + B) / v. F and B are of a whole rank, v stages.

    Notes
    -----
    Narayanan et al., SC 2021, section 2.2.2. Without communication, m a multiple of p.
    """
    return (microbatches + (ranks - 1) / stages_per_rank) * (forward_s + backward_s)


def interleaved_1f1b_peak_activations(*, ranks: int, microbatches: int, stages_per_rank: int) -> float:
    """Activations of a whole rank held on rank 0 under interleaved 1F1B: p (1 + (p - 1) / (p v)), at most m.

    Notes
    -----
    Narayanan et al., SC 2021. m a multiple of p.
    """
    return min(microbatches, ranks + (ranks - 1) / stages_per_rank)


def zb_h1_makespan_s(
    *,
    ranks: int,
    microbatches: int,
    forward_s: float,
    backward_input_s: float,
    backward_weight_s: float,
    latency_s: float = 0.0,
) -> float:
    """ZB-H1's step: m (F + I + W) + (p - 1)(F + I - W + 4 c).

    Notes
    -----
    Qi et al., Zero Bubble, ICLR 2024, table 1, for W <= F, W <= I and m >= p. The part of c was found by evaluation,
    for m >= 2p and small c. It gives the digits of the paper's table 5.
    """
    full_s = forward_s + backward_input_s + backward_weight_s
    return microbatches * full_s + (ranks - 1) * (forward_s + backward_input_s - backward_weight_s + 4 * latency_s)


def zb_h1_peak_activation_bytes(*, ranks: int, stage: int, activation_bytes: int, weight_activation_bytes: int) -> int:
    """ZB-H1's peak on a stage, counted from 0: (p - stage) M_B + stage M_W.

    Notes
    -----
    M_B is activation_bytes, M_W weight_activation_bytes. Qi et al., ICLR 2024, table 1, for m >= p.
    """
    return (ranks - stage) * activation_bytes + stage * weight_activation_bytes


def zb_h2_rank_time_s(
    *,
    ranks: int,
    microbatches: int,
    forward_s: float,
    backward_input_s: float,
    backward_weight_s: float,
    latency_s: float = 0.0,
) -> float:
    """ZB-H2's longest time of one rank: m (F + I + W) + max(0, (p - 1)(F + I + 2c - 2W)).

    Notes
    -----
    Qi et al., ICLR 2024, table 1, for W <= F, W <= I, m >= 2p - 1 and small c. The makespan is longer, since ranks
    start one after another.
    """
    full_s = forward_s + backward_input_s + backward_weight_s
    wait_s = forward_s + backward_input_s + 2 * latency_s - 2 * backward_weight_s
    return microbatches * full_s + max(0.0, (ranks - 1) * wait_s)


def zb_h2_peak_activations(*, ranks: int) -> int:
    """Activations held on rank 0 under ZB-H2, the most of all ranks: 2p - 1.

    Notes
    -----
    Qi et al., ICLR 2024, for m >= 2p - 1.
    """
    return 2 * ranks - 1


def zb_v_peak_activations(*, ranks: int) -> int:
    """Activations of a whole rank, two stages, held under ZB-V: p.

    Notes
    -----
    Qi et al., Pipeline Parallelism with Controllable Memory, 2024, for m >= 2p. With F = I = W and without
    communication the time of each rank is m (F + I + W): no bubble.
    """
    return ranks


def v_half_peak_activations(*, ranks: int) -> int:
    """Activations of a whole rank, two stages, held under V-Half from F to W: floor((p + 2) / 2).

    Notes
    -----
    Qi et al., Pipeline Parallelism with Controllable Memory, 2024. F = I = W, m large enough.
    """
    return (ranks + 2) // 2


def v_min_peak_activations(*, ranks: int) -> int:
    """Activations of a whole rank, two stages, held under V-Min from F to W: floor((p + 4) / 3).

    Notes
    -----
    Qi et al., Pipeline Parallelism with Controllable Memory, 2024. F = I = W, m large enough.
    """
    return (ranks + 4) // 3


def dualpipe_v_bubble_s(*, ranks: int, pair_s: float, backward_s: float, backward_weight_s: float) -> float:
    """DualPipeV's longest bubble of a rank: (p - 1)(FB + B - 3W), times of one stage (half a rank).

    Notes
    -----
    pair_s is FB, the overlapped pair. DeepSeek-AI, DualPipe, 2025, README, which counts p as PP / 2. Without
    communication, and only where F = I, W <= F and FB >= B. Elsewhere the same orders idle longer or shorter.
    """
    return (ranks - 1) * (pair_s + backward_s - 3 * backward_weight_s)


def dualpipe_v_peak_activations(*, ranks: int) -> int:
    """Activations of one stage (half a rank) held under DualPipeV: 2p + 1, on every rank.

    DeepSeek-AI, DualPipe, 2025, README: PP + 1, where its PP stages are two on each of p ranks.
    """
    return 2 * ranks + 1


def dualpipe_bubble_s(*, ranks: int, pair_s: float, backward_s: float, backward_weight_s: float) -> float:
    """DualPipe's longest bubble of a rank: (p / 2 - 1)(FB + B - 3W), times of one of p stages.

    Notes
    -----
    pair_s is FB, the overlapped pair. DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, table 2. Conditions as for
    `dualpipe_v_bubble_s`: what two ranks of DualPipe do as mirror images, one rank of DualPipeV does.
    """
    return dualpipe_v_bubble_s(
        ranks=ranks // 2, pair_s=pair_s, backward_s=backward_s, backward_weight_s=backward_weight_s
    )


def dualpipe_peak_activations(*, ranks: int) -> int:
    """Activations of one stage held under DualPipe: p + 1, on every rank.

    DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, table 2. m >= 2p.
    """
    return dualpipe_v_peak_activations(ranks=ranks // 2)


def chimera_bubble_s(*, ranks: int, microbatches: int, forward_s: float, backward_s: float) -> float:
    """Chimera's bubble of every rank: (p - 2)(max(F, B) + (m / p - 1)|B - F|), for m a multiple of p.

    Raises
    ------
    InputError
        For other m.

    Notes
    -----
    Li and Hoefler, Chimera, SC 2021. Where F = B it is (p - 2) F for any number of units, their ratio
    (D - 2) / (2N + D - 2); one unit of p microbatches takes p forwards and 2p - 2 backwards, as in their figure 6. What
    units after the first add was found by evaluation: with direct concatenation each leaves gaps where F and B differ.
    """
    if microbatches % ranks:
        raise InputError(
            f"Chimera's bubble has a closed form for m a multiple of p, got m={microbatches}, p={ranks}: take "
            f"m={microbatches // ranks * ranks or ranks} or simulate"
        )
    uneven_s = (microbatches // ranks - 1) * abs(backward_s - forward_s)
    return (ranks - 2) * (max(forward_s, backward_s) + uneven_s)


def chimera_peak_activations(*, ranks: int, rank: int) -> int:
    """Activations of one stage held on a rank, counted from 0, under Chimera: p / 2 + 1 + min(rank, p - 1 - rank).

    Notes
    -----
    Li and Hoefler, Chimera, SC 2021, table 2: from D / 2 + 1 to D. m >= p.
    """
    return ranks // 2 + 1 + min(rank, ranks - 1 - rank)
