"""Inference: bootstrap intervals, paired differences and permutation p-values."""

from collections.abc import Callable

import numpy as np
import pandas as pd

MIDDLE = (0.025, 0.975)  # the 95 % between these quantiles


def bootstrap(statistic: Callable, *arrays, axes: int = 1, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """The 95 % interval of a statistic, what stands along the leading axes drawn again with replacement. -> (2, ...)

    arrays: of the same items, which are drawn together, so that what is compared stays paired. axes: how many are drawn.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(array) for array in arrays]
    drawn = []
    for _ in range(resamples):
        places = np.ix_(*(rng.integers(size, size=size) for size in arrays[0].shape[:axes]))
        drawn.append(statistic(*(array[places] for array in arrays)))
    drawn = np.array(drawn)
    if np.isnan(drawn).all():  # of what is not known
        return np.full((2, *drawn.shape[1:]), np.nan)
    return np.nanquantile(drawn, MIDDLE, axis=0)


def mean_interval(values, seed: int = 0) -> tuple[float, float, float]:
    """A mean and its 95 % bootstrap interval: mean, low, high. NaN ones are left out."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return (np.nan,) * 3
    drawn = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    return (float(values.mean()), *map(float, np.quantile(drawn, MIDDLE)))


def paired(one: pd.Series, other: pd.Series, seed: int = 0) -> pd.Series:
    """How much larger one measure is than another on the same items, which the index names.

    -> difference (the mean), low and high (95 % bootstrap), p (two-sided, by flipping the signs of the items'
    differences) and n, the items that both have.
    """
    differences = (one - other).dropna().to_numpy(dtype=float)
    mean, low, high = mean_interval(differences, seed)
    signs = np.random.default_rng(seed).choice([-1, 1], (2000, len(differences)))
    null = np.abs(signs @ differences) / max(len(differences), 1)
    p = p_value(null, abs(mean)) if len(differences) else np.nan
    return pd.Series({"difference": mean, "low": low, "high": high, "p": p, "n": len(differences)})


def p_value(null: np.ndarray, observed: float) -> float:
    """How often chance does as well, counting what was observed as one such case."""
    return float((1 + (null >= observed - 1e-12).sum()) / (1 + len(null)))
