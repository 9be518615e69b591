"""Methods that draw text to a topic, compared at equal fluency."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from backpack_lib.analysis.statistics import MIDDLE, mean_shares

TEMPERATURES = (0.3, 2.0)  # sought between these
USUAL_SLOPE = 6.0  # of log-perplexity over temperature, near temperature 1


def matched_temperature(perplexity_at: Callable[[float], float], wanted: float, trials: int = 3) -> float:
    """The sampling temperature at which a method's perplexity is the wanted one, found in a few trials.

    perplexity_at: the method's perplexity at a temperature. Its logarithm is nearly a line, whose slope the first
    two trials measure.
    """
    if not 0 < wanted < np.inf:
        raise ValueError(f"A perplexity of {wanted} cannot be matched; it should be a finite number above 0.")
    temperature, gaps = 1.0, {}
    for _ in range(trials):
        gaps[temperature] = np.log(wanted) - np.log(perplexity_at(temperature))
        slope = -np.polyfit(list(gaps), list(gaps.values()), 1)[0] if len(gaps) > 1 else USUAL_SLOPE
        step = gaps[temperature] / max(slope, USUAL_SLOPE / 3)
        temperature = float(np.clip(temperature + step, *TEMPERATURES))
    return round(temperature, 3)


def search_temperature(
    perplexity_at: Callable[[float], float], wanted: float, tolerance: float = 0.05, trials: int = 6
) -> dict[float, float]:
    """Tries temperatures until a method's perplexity is within a tolerance of the wanted one. -> those tried, and theirs

    perplexity_at: must use the same random numbers at every temperature, so that it hardly jumps. The first step goes by
    the usual slope, and once the wanted perplexity lies between two that were tried, so does the next temperature:
    by a line through the logarithms, kept away from the ends. Stops, too, where no temperature allowed is left.
    """
    if not 0 < wanted < np.inf:
        raise ValueError(f"A perplexity of {wanted} cannot be matched; it should be a finite number above 0.")
    tried, temperature = {}, 1.0
    for _ in range(trials):
        tried[temperature] = perplexity_at(temperature)
        if abs(tried[temperature] / wanted - 1) <= tolerance:
            break
        gaps = {t: float(np.log(p / wanted)) for t, p in tried.items()}
        below, above = ([t for t, gap in gaps.items() if sign * gap > 0] for sign in (-1, 1))
        if below and above:
            low, high = max(below), min(above)
            part = gaps[low] / (gaps[low] - gaps[high]) if low < high else 0.5
            temperature = low + float(np.clip(part, 0.1, 0.9)) * (high - low)
        else:
            edge = max(below) if below else min(above)
            temperature = float(np.clip(edge - gaps[edge] / USUAL_SLOPE, *TEMPERATURES))
        temperature = round(temperature, 3)
        if temperature in tried:
            break
    return tried


def success(rows: pd.DataFrame, none: pd.DataFrame) -> dict[str, float]:
    """How often texts are on their topic: the mean over topics, and how many times that of no control it is.

    rows, none: a row for each topic, in the same order, with the columns `texts` and `on topic`, under control and
    without. Returns success, low, high, times, times low and times high: values with their 95 % intervals. Where
    nothing is on topic without control, there is no such multiple (NaN).
    """
    value, value_of_none = ((table["on topic"] / table["texts"]).mean() for table in (rows, none))
    draws, draws_of_none = mean_shares(rows, seed=0), mean_shares(none, seed=1)
    if value_of_none:
        ratios = np.divide(draws, draws_of_none, out=np.full_like(draws, np.inf), where=draws_of_none > 0)
        times = [value / value_of_none, *np.quantile(ratios, MIDDLE, method="inverted_cdf")]
    else:
        times = [np.nan] * 3
    names = ("success", "low", "high", "times", "times low", "times high")
    return dict(zip(names, map(float, (value, *np.quantile(draws, MIDDLE), *times))))
