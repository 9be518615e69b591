"""Inference: bootstrap intervals that resample professions and templates, and permutation tests."""

from collections.abc import Callable

import numpy as np

MIDDLE = (0.025, 0.975)  # the 95 % between these quantiles


def bootstrap_intervals(statistic: Callable, *arrays: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """The 95 % interval of a statistic, professions and templates both drawn again with replacement. -> (2, ...)

    arrays: each (P, T, ...), of the same professions and templates, so that what is compared stays paired.
    """
    rng = np.random.default_rng(seed)
    P, T = arrays[0].shape[:2]
    drawn = []
    for _ in range(resamples):
        rows, columns = rng.integers(P, size=P)[:, None], rng.integers(T, size=T)
        drawn.append(statistic(*(array[rows, columns] for array in arrays)))
    drawn = np.array(drawn)
    if np.isnan(drawn).all():  # of what is not known
        return np.full((2, *drawn.shape[1:]), np.nan)
    return np.nanquantile(drawn, MIDDLE, axis=0)


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """A mean and its 95 % interval, the values drawn again with replacement: mean, low, high. NaN ones are left out."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return (np.nan,) * 3
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(1)
    return (float(values.mean()), *map(float, np.quantile(drawn, MIDDLE)))


def p_value(null: np.ndarray, found: float) -> float:
    """How often chance does as well, counting what was found as one such case."""
    return float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))
