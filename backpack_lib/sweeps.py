"""Long measurements, in parts that are kept; methods compared at equal fluency; and intervals of shares."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from backpack_lib.paths import written_whole

TEMPERATURES = (0.3, 2.0)  # sought between these
USUAL_SLOPE = 6.0  # of log-perplexity over temperature, near temperature 1


def fingerprint(model) -> str:
    """A model's weights in twelve letters: other weights have others."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]


def kept(folder: Path, what: dict, make: Callable):
    """What `make()` returns, made once: it is kept as JSON in the folder, in a file named by all that `what` says.

    So a measurement of many parts goes on where it was stopped, or killed, and one with other settings begins anew.
    """
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(folder) / f"{key}.json"
    if not file.is_file():
        value = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as building:
            building.write_text(json.dumps({"what": what, "value": value}, ensure_ascii=False), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))["value"]


def matched_temperature(perplexity_at: Callable[[float], float], wanted: float, trials: int = 3) -> float:
    """The sampling temperature at which a method's perplexity is the wanted one, found in a few trials.

    perplexity_at: the method's perplexity at a temperature. Its logarithm is nearly a line, whose slope the first
    two trials measure.
    """
    temperature, gaps = 1.0, {}
    for _ in range(trials):
        gaps[temperature] = np.log(wanted) - np.log(perplexity_at(temperature))
        slope = -np.polyfit(list(gaps), list(gaps.values()), 1)[0] if len(gaps) > 1 else USUAL_SLOPE
        step = gaps[temperature] / max(slope, USUAL_SLOPE / 3)
        temperature = float(np.clip(temperature + step, *TEMPERATURES))
    return round(temperature, 3)


def mean_share(hits, of, resamples: int = 4000, seed: int = 0) -> np.ndarray:
    """Draws from the bootstrap of a mean of shares, hits / of, each of its own group of texts. (resamples,)

    To draw the texts of a group again with replacement, and count the hits, is to draw from a binomial.
    """
    hits, of = np.asarray(hits), np.asarray(of)
    return (np.random.default_rng(seed).binomial(of, hits / of, size=(resamples, len(of))) / of).mean(1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws from a bootstrap."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
