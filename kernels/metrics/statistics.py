"""How sure a mean is, and whether two differ: the bootstrap over prompts.

Prompts, not videos, are drawn again: two videos of one prompt are no two samples of what a model can do. The
interval is the expanded percentile one (Hesterberg, arXiv 1411.5279, section 4.1): the plain one is too narrow
for a small set, and it is widened as Student's t widens a normal one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 4000
FEWEST = 6  # prompts that can show a difference

Matrix = NDArray[np.float64]
Statistic = Callable[[Matrix], Matrix]


@dataclass(frozen=True)
class Interval:
    """A mean over `count` prompts and its 95 % interval; NaN bounds where a single prompt allows none."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Second less first, paired by prompt.

    seen: the interval leaves 0 out, so chance over prompts is no account of it. Never with fewer than 6 prompts: that
    so few all differ one way happens by chance in more than 1 of 20 cases (2^(1-n)).
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def seen(self) -> bool:
        return self.count >= FEWEST and (self.low > 0 or self.high < 0)


def draws(count: int, resamples: int, seed: int) -> Matrix:
    """How often each of `count` items is drawn [resamples, count]; each row sums to `count`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def percentile_interval(values: Matrix, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Expanded percentile interval of resampled statistics [R] of `count` items; NaN values are left out."""
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(0.5 + confidence / 2, count - 1))
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap(values: Matrix, statistic: Statistic, seed: int = 0) -> Interval:
    """A statistic of the prompts' mean scores, and its interval.

    values: [P, D], one row per prompt, NaN where a dimension does not apply to it. statistic: from dimension
    means [R, D] to figures [R] (a column, or a score of several). Raises ValueError without a row.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: needs [P >= 1, D] scores, got {values.shape}")
    mean = float(statistic(_means(np.ones((1, len(values))), values))[0])
    return _interval(mean, statistic(_means(draws(len(values), RESAMPLES, seed), values)), len(values))


def bootstrap_columns(values: Matrix, seed: int = 0) -> list[Interval]:
    """The mean of each column of values [P, D] over the prompts that have it, with its interval.

    What `bootstrap` says of each column alone, in one go. NaN throughout for a column that no prompt has.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: needs [P >= 1, D] scores, got {values.shape}")
    means = _means(np.ones((1, len(values))), values)[0]
    resampled = _means(draws(len(values), RESAMPLES, seed), values)
    counts = np.isfinite(values).sum(axis=0)
    columns = zip(means, resampled.T, counts, strict=True)
    return [_interval(float(mean), figures, int(count)) for mean, figures, count in columns]


def _interval(mean: float, resampled: Matrix, count: int) -> Interval:
    bounds = percentile_interval(resampled, count) if count > 1 else (math.nan, math.nan)
    return Interval(mean, *bounds, count)


def paired_difference(first: Matrix, second: Matrix, statistic: Statistic | None = None, seed: int = 0) -> Difference:
    """A statistic of the second set less that of the first, over the same prompts.

    first, second: [P, D], row by row of the same prompt. statistic: as in `bootstrap`, the first column's mean by
    default. Each resample draws the same prompts for both, so what makes a prompt hard for both cancels.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: must be paired with the first, {first.shape}, got {second.shape}")
    figure, width = statistic or first_column, first.shape[1]

    def gap(means: Matrix) -> Matrix:
        return figure(means[:, width:]) - figure(means[:, :width])

    found = bootstrap(np.concatenate([first, second], axis=1), gap, seed)
    return Difference(found.mean, found.low, found.high, found.count)


def first_column(means: Matrix) -> Matrix:
    """The statistic that is a single dimension's mean."""
    return means[:, 0]


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a probability above one half, by bisection on the exact distribution."""
    assert 0.5 < probability < 1
    assert degrees >= 1
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, degrees: int) -> float:
    """Distribution of Student's t with whole degrees of freedom: a finite sum (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan2(value, math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for step in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    share = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + share / 2


def _means(counts: Matrix, values: Matrix) -> Matrix:
    """Means of each dimension over the drawn prompts that have it [R, D]; NaN where none has."""
    known = np.isfinite(values)
    sums, weights = counts @ np.where(known, values, 0), counts @ known
    means: Matrix = np.where(weights > 0, sums / np.maximum(weights, 1), np.nan)
    return means
