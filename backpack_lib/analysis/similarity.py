"""Word similarity: do the senses of two words lie as close as people say that the words are?

    sets = read_sets("lexsim")                         # {"SimLex-999": DataFrame(word1, word2, score), ...}
    scores = similarity_table(vectors, sets)           # Spearman's rho of each similarity on each set

The similarities are those of Hewitt et al. (2023), section 4: the cosine of one matched sense, the
least and the greatest over matched senses and over all pairs of senses, and the cosine of all senses
laid end to end. All pairs are kept, also those of words that fall into several tokens.

The best of many similarities on a set flatters the model if it is picked and scored on the same pairs.
`held_out_table` picks it on some pairs and scores it on others, and gives an interval.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap, spearmanr

from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.files import as_seen
from backpack_lib.text.words import choose_tokens


@dataclass(frozen=True)
class WordPairs:
    """How a set is published: its file, what separates columns, whether a header names them, and which are read."""

    file: str
    separator: str
    header: bool
    columns: tuple[int, int, int]


SETS = {
    "SimLex-999": WordPairs("SimLex-999.txt", "\t", True, (0, 1, 3)),
    "SimVerb-3500": WordPairs("SimVerb-3500.txt", "\t", False, (0, 1, 3)),
    "RG-65": WordPairs("RG65.csv", ";", False, (0, 1, 2)),
    "WS-353": WordPairs("WS353.csv", ",", True, (0, 1, 2)),
}


def read_sets(source: str | Path) -> dict[str, pd.DataFrame]:
    """Those of the four sets that lie in a folder or under a URL, as columns word1, word2 and score.

    Raises ValueError if none is there, or if a file does not hold what its name says.
    """
    found, source = {}, as_seen(source)
    for name, pairs in SETS.items():
        try:
            table = pd.read_csv(
                f"{source}/{pairs.file}", sep=pairs.separator, header=0 if pairs.header else None, usecols=pairs.columns
            )
        except OSError:
            continue
        except ValueError as error:
            raise ValueError(f"{source}/{pairs.file} is not {name} as it is published: {error}") from error
        found[name] = table.set_axis(["word1", "word2", "score"], axis=1)
    if not found:
        files = ", ".join(pairs.file for pairs in SETS.values())
        raise ValueError(f"{str(source)!r} holds none of {files}; give the folder or URL where they are.")
    return found


def similarities(senses1: torch.Tensor, senses2: torch.Tensor) -> dict[str, np.ndarray]:
    """Every similarity of n pairs of words from their sense vectors, (n, k, d) each: name -> (n,)."""
    unit1, unit2 = F.normalize(senses1, dim=-1), F.normalize(senses2, dim=-1)
    matched = (unit1 * unit2).sum(-1)  # (n, k)
    found = {f"sense {l}": matched[:, l] for l in range(matched.shape[1])}
    if matched.shape[1] > 1:
        crossed = (unit1 @ unit2.transpose(1, 2)).flatten(1)  # (n, k * k)
        found |= {
            "least, matched": matched.amin(1),
            "greatest, matched": matched.amax(1),
            "least, all pairs": crossed.amin(1),
            "greatest, all pairs": crossed.amax(1),
            "all senses end to end": F.cosine_similarity(senses1.flatten(1), senses2.flatten(1)),
        }
    return {name: values.float().cpu().numpy() for name, values in found.items()}


def similarity_table(senses_of, sets: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Spearman's rho between each similarity (rows) and people's scores on each set (columns).

    senses_of: a function from words to their sense vectors, (n, k, d); see `of_model`.
    """
    columns = {}
    for name, pairs in sets.items():
        found = similarities(senses_of(list(pairs["word1"])), senses_of(list(pairs["word2"])))
        columns[name] = {
            similarity: spearmanr(values, pairs["score"]).statistic for similarity, values in found.items()
        }
    return pd.DataFrame(columns)


def held_out(found: dict[str, np.ndarray], scores: np.ndarray, folds: int = 10, seed: int = 0):
    """What the similarity that does best on the other folds says of each pair, and which one that was, for each fold.

    Different folds may choose similarities of different scale, so a value is given as the share of the values
    of its similarity, on the folds it was chosen on, that lie below it: (n,) between 0 and 1. An only
    similarity's values stay as they are.
    """
    if len(found) == 1:  # nothing to choose
        ((only, values),) = found.items()
        return values, [only]
    predicted, chosen = np.empty(len(scores)), []
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(scores)), folds):
        rest = np.setdiff1d(np.arange(len(scores)), fold)
        best = max(found, key=lambda name: _rank_correlation(found[name][rest], scores[rest]))
        predicted[fold] = np.searchsorted(np.sort(found[best][rest]), found[best][fold]) / len(rest)
        chosen.append(best)
    return predicted, chosen


def _rank_correlation(values: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's rho; -1 for values that are all the same, which have none and are the last to be chosen."""
    return spearmanr(values, scores).statistic if np.ptp(values) > 0 else -1.0


def held_out_table(senses_of, sets: dict[str, pd.DataFrame], seed: int = 0, resamples: int = 1000) -> pd.DataFrame:
    """How well the best similarity does where it was not picked: one row for each set.

    Columns: rho (Spearman's, of the held-out predictions), low and high (95 % bootstrap interval over pairs),
    and chosen (the similarity that most folds picked, and how many of them).
    """
    rows = {}
    for name, pairs in sets.items():
        scores = pairs["score"].to_numpy()
        found = similarities(senses_of(list(pairs["word1"])), senses_of(list(pairs["word2"])))
        predicted, chosen = held_out(found, scores, seed=seed)
        low, high = bootstrap(
            (predicted, scores),
            lambda x, y: spearmanr(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        most = max(sorted(set(chosen)), key=chosen.count)
        rows[name] = {
            "rho": spearmanr(predicted, scores).statistic,
            "low": low,
            "high": high,
            "chosen": most if len(found) == 1 else f"{most} ({chosen.count(most)} of {len(chosen)} folds)",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def paired_differences(
    methods: dict, sets: dict[str, pd.DataFrame], seed: int = 0, resamples: int = 1000
) -> pd.DataFrame:
    """How much better the first method's held-out rho is than each other's, on the same pairs of words.

    methods: name -> function from words to sense vectors. Pairs are drawn again with replacement, the same ones for all
    methods (their choice of a similarity is not repeated), and the mean over sets is drawn with them.

    -> a row for each other method and set, and for their mean over sets: difference, low and high (95 %).
    """
    predicted = {}
    for name, senses_of in methods.items():
        for set_name, pairs in sets.items():
            found = similarities(senses_of(list(pairs["word1"])), senses_of(list(pairs["word2"])))
            predicted[name, set_name] = held_out(found, pairs["score"].to_numpy(), seed=seed)[0]
    first, *others = methods
    rng, draws = np.random.default_rng(seed), {}
    for set_name, pairs in sets.items():
        scores = pairs["score"].to_numpy()
        draws[set_name] = np.array(
            [
                [spearmanr(predicted[name, set_name][i], scores[i]).statistic for name in methods]
                for i in [np.arange(len(scores)), *rng.integers(len(scores), size=(resamples, len(scores)))]
            ]
        )  # the first row is of the pairs as they are
    draws["mean"] = np.mean(list(draws.values()), axis=0)
    rows = {}
    for column, other in enumerate(others, start=1):
        for set_name, drawn in draws.items():
            difference = drawn[:, 0] - drawn[:, column]
            low, high = np.nanquantile(difference[1:], [0.025, 0.975])
            rows[other, set_name] = {"difference": difference[0], "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["other", "set"])


def of_input_embeddings(model, tokenizer, multi_token: str = "mean"):
    """The function from words to a model's input embeddings, as one sense, (n, 1, d)."""
    E = model.get_input_embeddings().weight.detach()

    def vectors(words: list[str]) -> torch.Tensor:
        return torch.stack([E[choose_tokens(tokenizer, word, multi_token)].mean(0) for word in words])[:, None]

    return vectors


def of_model(model, tokenizer, multi_token: str = "mean"):
    """The function from words to vectors that a model gives; a Transformer's are its input embeddings."""
    return lambda words: senses_of_words(model, tokenizer, words, multi_token)
