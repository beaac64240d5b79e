"""Aggregates over seeds and measures over sequences, against hand-made numbers."""

import numpy as np
import pytest
from scipy import stats

from knife_jax import continual
from knife_jax.statistics import Estimate, iqm, iqm_estimate, mean_estimate, performance_profile


def test_iqm_is_the_mean_of_the_middle_half():
    """Outer quarters have no weight."""
    assert iqm(np.array([-1e9, 1.0, 2.0, 1e9])) == 1.5
    np.testing.assert_array_equal(iqm(np.array([[0.0, 1, 2, 3], [4, 4, 4, 4]])), [1.5, 4.0])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Bootstrap and Wilson intervals, 200 samples each, nominal 95 %."""
    rng = np.random.default_rng(0)
    gauss = [iqm_estimate(rng.normal(size=40)) for _ in range(200)]
    coins = [mean_estimate((rng.random(40) < 0.8).astype(float)) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 0 <= high for _, low, high in gauss]) <= 0.99
    assert 0.88 <= np.mean([low <= 0.8 <= high for _, low, high in coins]) <= 0.99


def test_equal_seeds_and_missing_seeds():
    """All successes still leave room for failure; NaNs are left out; nothing gives NaN."""
    certain = mean_estimate(np.ones(64))
    assert certain.value == 1 and 0.9 < certain.low < 1
    assert iqm_estimate(np.array([2.0, np.nan, 2.0])) == Estimate(2.0, 2.0, 2.0)
    alone = iqm_estimate(np.array([0.5]))
    assert alone.value == 0.5 and np.isnan(alone.low) and not alone.below(certain) and str(alone) == "0.50"
    assert np.isnan(mean_estimate(np.array([np.nan]))).all()
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"


def test_below_needs_intervals_apart():
    """Touching is not apart."""
    assert Estimate(0.1, 0.0, 0.2).below(Estimate(0.5, 0.3, 0.7))
    assert not Estimate(0.1, 0.0, 0.3).below(Estimate(0.5, 0.3, 0.7))


def test_performance_profile():
    """Shares against counting; the band against the binomial law that resampling whole seeds follows; NaNs are left out."""
    scores, thresholds = np.array([0.0, 0.25, 0.25, 0.5, 1.0, np.nan] * 4), np.array([-1.0, 0.0, 0.25, 0.3, 1.0])
    profile = performance_profile(scores, thresholds)
    np.testing.assert_allclose(profile.share, [1.0, 0.8, 0.4, 0.4, 0.0])
    expected = stats.binom.ppf(np.array([[0.025], [0.975]]), 20, profile.share) / 20
    np.testing.assert_allclose([profile.low, profile.high], expected, atol=0.051)
    assert np.all(profile.low <= profile.share) and np.all(profile.share <= profile.high)
    alone = performance_profile(np.array([0.5]), thresholds)
    np.testing.assert_array_equal(alone.share, [1, 1, 1, 1, 0])
    assert np.isnan(alone.low).all() and np.isnan(performance_profile(np.array([np.nan]), thresholds).share).all()


def test_sequence_measures_by_hand():
    """Two tasks and the first again, one seed."""
    curves = np.array([[[0.0, 0.5, 1.0], [0.0, 0.0, 0.8], [0.2, 0.3, 0.4]]])
    everywhere = np.array([[[1.0, 0.0], [0.3, 0.8], [0.4, 0.1]]])
    measures = continual.sequence_measures(curves, everywhere, (0, 1, 0))
    np.testing.assert_allclose(measures.average, [0.25])
    np.testing.assert_allclose(measures.forgetting, [0.7])
    np.testing.assert_allclose(measures.plasticity, [0.4])
    np.testing.assert_allclose(continual.area_under_curve(curves), [[0.5, 0.2, 0.3]])


@pytest.mark.parametrize(("order", "expected"), [((0, 1, 2), None), ((0, 1, 0), (0, 2)), ((2, 0, 1, 0, 0), (1, 4))])
def test_returns_to_finds_the_first_task_met_again(order, expected):
    """First and last position of it."""
    assert continual.returns_to(order) == expected


def test_no_return_and_no_change_of_task():
    """What is not defined is NaN, not a number."""
    single = continual.sequence_measures(np.ones((2, 1, 3)), np.ones((2, 1, 1)), (0,))
    assert np.isnan(single.forgetting).all() and np.isnan(single.plasticity).all()
    np.testing.assert_array_equal(single.average, [1.0, 1.0])
