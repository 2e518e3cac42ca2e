"""95% intervals by the bootstrap (Efron 1979): what other draws of as many pictures would have
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
_NORMAL_QUANTILE = 1.959964  # of (1 + LEVEL) / 2


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


def resample_counts(size: int, resamples: int, rng: np.random.Generator) -> Int[np.ndarray, "R N"]:
    """The number of times that each of `size` pictures is in each resample of that size."""
    return rng.multinomial(size, np.full(size, 1 / size), size=resamples)


def mean_interval(
    values: Shaped[np.ndarray, "N"] | Sequence[float], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of the values that are not nan, with the percentile interval. ValueError if there are
    none.

    Where all values agree, so do all resamples and the interval is a point: n right answers of n
    say no more than that the true share is likely above 1 - 3 / n.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        raise ValueError("mean_interval: there are no values")
    if not np.isfinite(values).all():
        raise ValueError("mean_interval: there are infinite values, whose mean says nothing")
    rng, means = np.random.default_rng(seed), []
    step = max(1, 10_000_000 // values.size)  # at most so many counts in memory
    for start in range(0, resamples, step):
        means.append(
            resample_counts(values.size, min(step, resamples - start), rng) @ values / values.size
        )
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def spread_interval(value: float, replicates: Float[np.ndarray, "R"]) -> Estimate:
    """The replicates' spread around the value: for statistics that resampling biases, such as FID,
    whose replicates all lie above it because a resample has fewer distinct pictures.
    """
    reach = _NORMAL_QUANTILE * float(np.std(replicates, ddof=1))
    return Estimate(float(value), float(value) - reach, float(value) + reach)
