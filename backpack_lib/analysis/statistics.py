"""Inference: bootstrap intervals that resample professions and templates, or topics' texts, and permutation tests."""

from collections.abc import Callable

import numpy as np
import pandas as pd

MIDDLE = (0.025, 0.975)  # the 95 % between these quantiles


def mean_shares(table: pd.DataFrame, seed: int, resamples: int = 4000) -> np.ndarray:
    """Draws from the bootstrap of the mean over topics of `on topic` / `texts`. (resamples,)

    To draw a topic's texts again with replacement, and count those on it, is to draw from a binomial.
    """
    texts, share = table["texts"].to_numpy(), (table["on topic"] / table["texts"]).to_numpy()
    return (np.random.default_rng(seed).binomial(texts, share, size=(resamples, len(table))) / texts).mean(1)


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
    return np.nanquantile(drawn, MIDDLE, axis=0)


def p_value(null: np.ndarray, found: float) -> float:
    """How often chance does as well, counting what was found as one such case."""
    return float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))
