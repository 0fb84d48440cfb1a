"""Plots of many samples: step times, and spreads in a timeline."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ppsim import Ensemble, Jitter, Network, StageCost, build_schedule, monte_carlo, simulate
from ppsim.plots.step_times_figure import step_times
from ppsim.plots.timeline_figure import timeline

COST = StageCost(forward_s=0.01, backward_input_s=0.012, backward_weight_s=0.008, output_bytes=1 << 20)
NETWORK = Network(latency_s=0.002, bytes_per_s=4e9)
SCHEDULE = build_schedule("1f1b", ranks=3, microbatches=4)


def sampled(seed: int = 0, samples: int = 300, **jitter: float) -> Ensemble:
    return monte_carlo(SCHEDULE, [COST] * 3, network=NETWORK, jitter=Jitter(**jitter), samples=samples, seed=seed)


def curves(figure) -> dict[str, object]:
    return {trace.legendgroup: trace for trace in figure.data if trace.yaxis == "y2" and trace.line.shape == "hv"}


class TestStepTimes:
    def test_the_curve_is_the_share_of_steps_that_took_no_longer(self):
        ensemble = sampled(action=0.1)
        curve = curves(step_times({"predicted": ensemble}))["predicted"]
        x_s, share = np.asarray(curve.x) / 1e3, np.asarray(curve.y)
        for at, reached in zip(x_s[1:], share[1:], strict=True):
            assert reached == pytest.approx((ensemble.step_s <= at + 1e-12).mean())
        assert (share[0], share[-1]) == (0, 1)
        assert curve.line.shape == "hv"

    def test_histograms_have_the_area_one_whatever_their_bins(self):
        figure = step_times({"many": sampled(action=0.1)}, measured={"few": [0.15, 0.16, 0.17]})
        outlines = [trace for trace in figure.data if trace.fill == "tozeroy"]
        assert len(outlines) == 2
        for outline in outlines:
            x, y = np.asarray(outline.x), np.asarray(outline.y)
            assert np.sum(np.diff(x) * y[:-1]) == pytest.approx(1)
        assert len(outlines[0].x) > len(outlines[1].x)

    def test_points_mark_the_percentiles(self):
        ensemble = sampled(action=0.1)
        figure = step_times({"predicted": ensemble})
        (points,) = (trace for trace in figure.data if trace.mode == "markers")
        assert np.asarray(points.x) / 1e3 == pytest.approx(ensemble.percentile([5, 50, 95, 99]))
        assert list(points.y) == [0.05, 0.5, 0.95, 0.99]
        assert list(points.hovertext)[1] == f"p50 {ensemble.percentile(50) * 1e3:.4g} ms"

    def test_predictions_are_dashed_and_measurements_are_not(self):
        trace = dataclasses.replace(
            simulate(SCHEDULE, [COST] * 3), clock="measured", details={"step_times_s": [0.2, 0.21, 0.25]}
        )
        figure = step_times({"predicted": sampled(action=0.1)}, measured={"run": trace, "other": [0.3]})
        found = curves(figure)
        assert found["predicted"].line.dash != "solid"
        assert found["run"].line.dash == found["other"].line.dash == "solid"
        assert np.asarray(found["run"].x)[1:].tolist() == pytest.approx([200, 210, 250])
        assert len({curve.line.color for curve in found.values()}) == 3
        assert found["run"].name.startswith("<b>run</b>   3 steps, median 210 ms")

    def test_the_band_around_measured_steps_is_that_of_kolmogorovs_statistic(self):
        """The bound is a little wider than the exact quantile in SciPy, and as wide in the limit."""
        stats = pytest.importorskip("scipy.stats")
        for count in (20, 1000):
            measured = np.random.default_rng(0).normal(0.2, 0.01, count)
            figure = step_times({"predicted": sampled(action=0.1)}, measured={"run": measured})
            (band,) = (trace for trace in figure.data if trace.name == "95% confidence")
            x, (upper, lower) = np.asarray(band.x) / 1e3, np.asarray(band.y).reshape(2, -1)
            assert band.legendgroup == "run"
            assert x[: 2 * count : 2] == pytest.approx(np.sort(measured))
            half = (upper - lower[::-1]).max() / 2
            exact = stats.kstwo.ppf(0.95, count)
            assert exact < half < exact * (1 + 0.5 / count**0.5)
            share = np.repeat(np.arange(count + 1) / count, 2)[1:-1]
            assert upper == pytest.approx(np.minimum(share + half, 1))
            assert lower[::-1] == pytest.approx(np.maximum(share - half, 0))

    def test_steps_that_do_not_vary_are_drawn(self):
        figure = step_times({"calm": sampled(samples=5)})
        low, high = figure.layout.xaxis.range
        assert low < simulate(SCHEDULE, [COST] * 3, network=NETWORK).makespan_s * 1e3 < high
        nothing = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
        empty = monte_carlo(SCHEDULE, [nothing] * 3, jitter=Jitter(), samples=5)
        assert step_times({"empty": empty}).layout.xaxis.range == (-1, 1)

    def test_markup_in_names_is_escaped(self):
        figure = step_times({"<i>a</i>": sampled(samples=5)})
        assert "<i>" not in "".join(trace.name for trace in figure.data)

    @pytest.mark.parametrize(
        ("measured", "said"),
        [
            ({}, "there is nothing to draw"),
            ({"run": []}, "the steps of 'run' must be finite seconds, one or more"),
            ({"run": [float("nan")]}, "must be finite seconds"),
            ({"run": simulate(SCHEDULE, [COST] * 3)}, "the trace 'run' has no step_times_s"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, measured: dict, said: str):
        with pytest.raises(ValueError, match=said):
            step_times({}, measured=measured)


class TestSpreads:
    def test_a_bracket_reaches_from_the_5th_to_the_95th_percentile_of_each_start(self):
        ensemble = sampled(action=0.1)
        trace = simulate(SCHEDULE, [COST] * 3, network=NETWORK)
        figure = timeline({"other": trace, "mean": trace}, spreads={"mean": ensemble})
        (lines,) = (each for each in figure.data if "of samples" in each.name)
        x, y = np.asarray(lines.x).reshape(-1, 3, 3), np.asarray(lines.y).reshape(-1, 3, 3)
        begin_s, end_s = ensemble.start_quantiles_s([5, 95])
        assert x[:, 1, 0] / 1e3 == pytest.approx(begin_s)
        assert x[:, 1, 1] / 1e3 == pytest.approx(end_s)
        assert np.isnan(x[:, :, 2]).all()
        lanes = np.asarray(figure.layout.yaxis.tickvals)[3:]
        assert (np.abs(y[:, 1, 0] - lanes[trace.program.rank]) < 0.5).all()
        assert (y[:, 1, 0] == y[:, 1, 1]).all()

    def test_a_pair_has_one_bracket(self):
        orders = [["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"]]
        schedule = type(SCHEDULE).of(orders)
        ensemble = monte_carlo(schedule, [COST], jitter=Jitter(action=0.1), samples=20)
        figure = timeline({"one": ensemble.trace(0)}, spreads={"one": ensemble})
        (lines,) = (each for each in figure.data if "of samples" in each.name)
        assert len(lines.x) == 5 * 9

    def test_samples_of_something_else_are_refused(self):
        trace = simulate(SCHEDULE, [COST] * 3)
        with pytest.raises(ValueError, match="there are samples for 'b', but the traces are 'a'"):
            timeline({"a": trace}, spreads={"b": sampled()})
        other = build_schedule("afab", ranks=3, microbatches=4)
        with pytest.raises(ValueError, match="samples of the trace's own program"):
            timeline({"a": simulate(other, [COST] * 3)}, spreads={"a": sampled()})
