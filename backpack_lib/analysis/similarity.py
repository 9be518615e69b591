"""Word similarity: do the senses of two words lie as close as people say that the words are?

    sets = read_sets("lexsim")                  # {"SimLex-999": DataFrame(word1, word2, score), ...}
    vectors = of_model(model, tokenizer)        # a function from n words to their sense vectors, (n, k, d)
    scores = similarity_table(vectors, sets)    # Spearman's rho of each similarity on each set

The similarities are those of Hewitt et al. (2023), section 4. The best of many on a set flatters the model if it is
picked and scored on the same pairs; `held_out_table` picks it on some pairs and scores it on others.
"""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap, spearmanr

from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.analysis.statistics import MIDDLE
from backpack_lib.files import as_seen, first_line
from backpack_lib.text.words import tokens_of_word

FOLDS = 10
RESAMPLES = 1000


# How each set is published: its file, what separates columns, whether a header names them, and which are read.
SETS = {
    "SimLex-999": ("SimLex-999.txt", "\t", True, (0, 1, 3)),
    "SimVerb-3500": ("SimVerb-3500.txt", "\t", False, (0, 1, 3)),
    "RG-65": ("RG65.csv", ";", False, (0, 1, 2)),
    "WS-353": ("WS353.csv", ",", True, (0, 1, 2)),
}


def read_sets(source: str | Path) -> dict[str, pd.DataFrame]:
    """Those of the four sets that lie in a folder or under a URL, as columns word1, word2 and score.

    A row that lacks a word, or a score that is a number, is left out with a warning.
    """
    sets, source = {}, as_seen(source)
    for name, (file, separator, has_header, columns) in SETS.items():
        path = f"{source}/{file}"
        # Words stay as they are written: pandas would take "null" for a missing one, and "1984" for a number.
        layout = {"sep": separator, "header": None, "usecols": columns, "encoding": "utf-8-sig"}
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, **layout)
        except OSError:
            continue
        except ValueError as error:
            raise ValueError(f"{path} is not {name} as it is published: {first_line(error)}") from error
        sets[name] = _usable_rows(table.set_axis(["word1", "word2", "score"], axis=1), has_header, path)
    if not sets:
        files = ", ".join(file for file, *_ in SETS.values())
        raise ValueError(f"{str(source)!r} holds none of {files}; give the folder or URL where they are.")
    return sets


def _usable_rows(table: pd.DataFrame, has_header: bool, path: str) -> pd.DataFrame:
    """The rows that have two words and a finite score. A header, which was read as a row, is not missed."""
    table = table.fillna("").apply(lambda column: column.str.strip())
    table["score"] = pd.to_numeric(table["score"], errors="coerce")
    usable = np.isfinite(table["score"]) & (table[["word1", "word2"]] != "").all(axis=1)
    if has_header and not usable.iloc[0]:
        table, usable = table[1:], usable[1:]
    if not usable.any():
        raise ValueError(f"{path} has no row with two words and a score; is it the file as it is published?")
    if not usable.all():
        first = ", ".join(str(row + 1) for row in table.index[~usable][:5])
        lost = f"{(~usable).sum()} of {len(table)} rows of {path} lack a word or a score that is a number"
        warnings.warn(f"{lost}, and are left out; the first of them: {first}.", stacklevel=3)
    return table[usable].reset_index(drop=True)


def similarities(senses1: torch.Tensor, senses2: torch.Tensor) -> dict[str, np.ndarray]:
    """Every similarity of n pairs of words from their sense vectors, (n, k, d) each: name -> (n,)."""
    unit1, unit2 = F.normalize(senses1, dim=-1), F.normalize(senses2, dim=-1)
    matched = (unit1 * unit2).sum(-1)  # (n, k)
    values = {f"sense {l}": matched[:, l] for l in range(matched.shape[1])}
    if matched.shape[1] > 1:
        crossed = (unit1 @ unit2.transpose(1, 2)).flatten(1)  # (n, k * k)
        values |= {
            "least, matched": matched.amin(1),
            "greatest, matched": matched.amax(1),
            "least, all pairs": crossed.amin(1),
            "greatest, all pairs": crossed.amax(1),
            "all senses end to end": F.cosine_similarity(senses1.flatten(1), senses2.flatten(1)),
        }
    return {name: cosines.float().cpu().numpy() for name, cosines in values.items()}


def similarity_table(vectors, sets: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Spearman's rho between each similarity (rows) and people's scores on each set (columns)."""
    columns = {}
    for name, pairs in sets.items():
        of_pairs = _similarities_of(vectors, pairs)
        columns[name] = {similarity: _rho(values, pairs["score"]) for similarity, values in of_pairs.items()}
    return pd.DataFrame(columns)


def held_out(values: dict[str, np.ndarray], scores: np.ndarray, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """What the similarity that does best on the other folds says of each pair, (n,), and which one that was, by fold.

    Folds may choose similarities of different scale, so a value is given as the share of the values of its similarity,
    on the folds it was chosen on, that lie below it. An only similarity's values stay as they are.
    """
    if len(values) == 1:  # nothing to choose
        ((only, of_only),) = values.items()
        return of_only, [only]
    predicted, chosen = np.empty(len(scores)), []
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(scores)), FOLDS):
        rest = np.setdiff1d(np.arange(len(scores)), fold)
        on_rest = {name: _rho(of_all[rest], scores[rest]) for name, of_all in values.items()}
        best = max(on_rest, key=on_rest.get)
        predicted[fold] = np.searchsorted(np.sort(values[best][rest]), values[best][fold]) / len(rest)
        chosen.append(best)
    return predicted, chosen


def held_out_table(vectors, sets: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """How well the best similarity does where it was not picked: one row for each set.

    Columns: rho (Spearman's), low and high (95 % bootstrap interval over pairs), and chosen (by most folds).
    """
    rows = {}
    for name, pairs in sets.items():
        scores = pairs["score"].to_numpy()
        predicted, chosen = held_out(_similarities_of(vectors, pairs), scores, seed)
        settings = {"paired": True, "vectorized": False, "n_resamples": RESAMPLES, "method": "percentile"}
        interval = bootstrap((predicted, scores), _rho, **settings, rng=np.random.default_rng(seed)).confidence_interval
        most = max(sorted(set(chosen)), key=chosen.count)
        folds = "" if len(chosen) == 1 else f" ({chosen.count(most)} of {len(chosen)} folds)"
        rows[name] = {"rho": _rho(predicted, scores), **interval._asdict(), "chosen": most + folds}
    return pd.DataFrame.from_dict(rows, orient="index")


def paired_differences(methods: dict, sets: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """How much better the first method's held-out rho is than each other's, on the same pairs of words.

    methods: name -> function from words to sense vectors. Pairs are drawn again with replacement, the same ones for all
    methods (their choice of a similarity is not repeated), and the mean over sets is drawn with them.
    -> a row for each other method and set, and for their mean over sets: difference, low and high (95 %).
    """
    first, *others = methods
    rng, differences = np.random.default_rng(seed), {other: {} for other in others}
    for set_name, pairs in sets.items():
        scores = pairs["score"].to_numpy()
        draws = [np.arange(len(scores)), *rng.integers(len(scores), size=(RESAMPLES, len(scores)))]  # all pairs first
        rhos = {}
        for name, vectors in methods.items():
            predicted = held_out(_similarities_of(vectors, pairs), scores, seed)[0]
            rhos[name] = np.array([_rho(predicted[draw], scores[draw]) for draw in draws])
        for other in others:
            differences[other][set_name] = rhos[first] - rhos[other]
    rows = {}
    for other, by_set in differences.items():
        for set_name, drawn in {**by_set, "mean": np.mean(list(by_set.values()), axis=0)}.items():
            low, high = np.nanquantile(drawn[1:], MIDDLE)
            rows[other, set_name] = {"difference": drawn[0], "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["other", "set"])


def of_input_embeddings(model, tokenizer):
    """The function from words to a model's input embeddings, the mean over a word's tokens, as one sense, (n, 1, d)."""
    E = model.get_input_embeddings().weight.detach()
    return lambda words: torch.stack([E[tokens_of_word(tokenizer, word)].mean(0) for word in words])[:, None]


def of_model(model, tokenizer):
    """The function from words to vectors that a model gives; a Transformer's are its input embeddings."""
    return lambda words: senses_of_words(model, tokenizer, words)


def _similarities_of(vectors, pairs: pd.DataFrame) -> dict[str, np.ndarray]:
    return similarities(vectors(list(pairs["word1"])), vectors(list(pairs["word2"])))


def _rho(values: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's rho; -1 for values that are all the same, which have none and are the last to be chosen."""
    return spearmanr(values, scores).statistic if np.ptp(values) > 0 else -1.0
