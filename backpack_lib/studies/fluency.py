"""Methods that draw text to a topic, compared at equal fluency."""

from collections.abc import Callable

import numpy as np

TEMPERATURES = (0.3, 2.0)  # sought between these
USUAL_SLOPE = 6.0  # of log-perplexity over temperature, near temperature 1


def search_temperature(
    perplexity_at: Callable[[float], float], wanted: float, tolerance: float = 0.05, trials: int = 6
) -> dict[float, float]:
    """Tries temperatures until a method's perplexity is within a tolerance of `wanted`. -> those tried, and theirs

    perplexity_at: must use the same random numbers at every temperature, so that it hardly jumps. The first step goes
    by the usual slope, and once the wanted perplexity lies between two that were tried, so does the next temperature:
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
            step = gaps[edge] / USUAL_SLOPE * 2 ** (len(tried) - 1)  # larger ones where the first were too small
            temperature = float(np.clip(edge - step, *TEMPERATURES))
        temperature = round(temperature, 3)
        if temperature in tried:
            break
    return tried
