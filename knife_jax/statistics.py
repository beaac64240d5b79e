"""Aggregates over seeds, with intervals.

Shapes: S and Z seeds, T thresholds, M metrics.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A point estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" if np.isnan(self.low) else f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def below(self, other: "Estimate") -> bool:
        """Whether this one's whole interval lies below the other's."""
        return self.high < other.low


class Profile(NamedTuple):
    """The share of runs above each threshold `[T]`, and the ends of its 95 % band."""

    share: Float[np.ndarray, "T"]
    low: Float[np.ndarray, "T"]
    high: Float[np.ndarray, "T"]


def iqm(values: Float[np.ndarray, "..."], axis: int = -1) -> np.ndarray:
    """The interquartile mean: the mean of the middle half.

    References:
        Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021.
    """
    from scipy import stats  # here and below, not above: importing it takes as long as importing JAX

    return np.asarray(stats.trim_mean(values, 0.25, axis=axis))


def iqm_estimate(values: Float[np.ndarray, "S"]) -> Estimate:
    """The interquartile mean over seeds, with a percentile bootstrap interval.

    NaNs (seeds with nothing to report) are left out. One seed has no interval: its ends are NaN. The bootstrap is seeded, so that equal
    data give equal intervals.
    """
    return _bootstrap(values, iqm)


def mean_estimate(values: Float[np.ndarray, "S"]) -> Estimate:
    """The mean over seeds.

    The interval is Wilson's where every seed is 0 or 1 (a bootstrap of equal values has no width), else a percentile bootstrap's.
    """
    kept = values[np.isfinite(values)]
    if kept.size and np.isin(kept, (0.0, 1.0)).all():
        from scipy import stats

        interval = stats.binomtest(int(kept.sum()), kept.size).proportion_ci(method="wilson")
        return Estimate(float(kept.mean()), float(interval.low), float(interval.high))
    return _bootstrap(values, np.mean)


def continuous_estimate(values: Float[np.ndarray, "S"]) -> Estimate:
    """The mean over seeds of numbers that are no successes (differences, shares of units), with a percentile bootstrap interval.

    Unlike `mean_estimate` it does not take zeros and ones for coins; equal values give an interval without width. NaNs are left out.
    """
    return _bootstrap(values, np.mean)


def probability_of_improvement(better: Float[np.ndarray, "S"], worse: Float[np.ndarray, "Z"]) -> Estimate:
    """The chance that a random seed of the first does better than a random seed of the second, ties counting half.

    The interval is a percentile bootstrap's over both; it needs two seeds of each, and is NaN otherwise.

    References:
        Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021.
    """

    def chance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        difference = np.sign(first[..., :, None] - second[..., None, :])
        return np.asarray(0.5 + 0.5 * difference.mean(axis=(-2, -1)))

    point = float(chance(better, worse))
    if min(len(better), len(worse)) < 2:
        return Estimate(point, np.nan, np.nan)
    rng = np.random.default_rng(0)
    draws = [values[rng.integers(len(values), size=(_RESAMPLES, len(values)))] for values in (better, worse)]
    drawn = np.concatenate([chance(*parts) for parts in zip(*(np.array_split(draw, 100) for draw in draws), strict=True)])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(point, float(low), float(high))


def performance_profile(scores: Float[np.ndarray, "S"], thresholds: Float[np.ndarray, "T"]) -> Profile:
    """The share of runs that score above each threshold; a run that meets a threshold exactly is not above it.

    With one score per run, its mean over tasks, this is the average-score distribution of the reference; the tasks of a sequence depend on
    each other, so that their scores are not counted as runs of their own. The band is a percentile bootstrap's over seeds, at each
    threshold by itself, and NaN with one seed. NaNs (seeds with nothing to report) are left out.

    References:
        Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021, Section 4.2.
    """
    kept = scores[np.isfinite(scores)]
    above = (kept[:, None] > thresholds).astype(np.float64)
    if len(kept) < 2:
        nothing = np.full(len(thresholds), np.nan)
        return Profile(above[0] if len(kept) else nothing, nothing, nothing)
    drawn = np.random.default_rng(0).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=_RESAMPLES)
    low, high = np.quantile(drawn @ above / len(kept), (0.025, 0.975), axis=0)
    return Profile(above.mean(axis=0), low, high)


def _bootstrap(values: np.ndarray, statistic: object) -> Estimate:
    kept = np.asarray(values, np.float64)[np.isfinite(values)]
    if kept.size == 0:
        return Estimate(np.nan, np.nan, np.nan)
    point = float(statistic(kept))  # pyright: ignore[reportCallIssue]
    if kept.size == 1:
        return Estimate(point, np.nan, np.nan)
    if np.ptp(kept) == 0:
        return Estimate(point, point, point)
    from scipy import stats

    result = stats.bootstrap((kept,), statistic, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    return Estimate(point, float(result.confidence_interval.low), float(result.confidence_interval.high))


def normal_estimates(values: Float[np.ndarray, "M S"]) -> list[Estimate]:
    """Means over seeds with normal intervals, of many metrics at once; for logs, where a bootstrap of each would take too long.

    NaNs are left out. Fewer than two numbers have no interval.
    """
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis=1)
    mean = np.divide(np.where(finite, values, 0.0).sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0)
    square = np.where(finite, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
    error = np.sqrt(np.divide(square, count * (count - 1.0), out=np.full(len(values), np.nan), where=count > 1))
    half = NormalDist().inv_cdf(0.975) * error
    return [Estimate(*map(float, numbers)) for numbers in zip(mean, mean - half, mean + half, strict=True)]
