"""Evidence that only the evaluation of the demo model asks for: word2vec's vectors, and more pairs for the roles."""

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from backpack_lib.analysis.senses import vectors_of_tokens
from backpack_lib.text.words import tokens_of_word


def of_word2vec(vectors):
    """The function from words to vectors, (n, 1, d), that gensim's `KeyedVectors` of lower-case words give.

    An unknown word gets zeros, so a similarity of zero.
    """

    def senses_of(words: list[str]) -> torch.Tensor:
        unknown = np.zeros(vectors.vector_size, np.float32)
        rows = [vectors[w] if w in vectors else unknown for w in map(str.lower, words)]
        return torch.from_numpy(np.stack(rows))[:, None]

    return senses_of


def related_words(tokenizer, pairs: pd.DataFrame, least_score: float) -> np.ndarray:
    """Pairs of words that people scored `least_score` or more, both ways round, where both are single tokens."""
    rows = pairs[pairs["score"] >= least_score]
    ids = [[tokens_of_word(tokenizer, word) for word in (row.word1, row.word2)] for row in rows.itertuples()]
    single = np.array([(a[0], b[0]) for a, b in ids if len(a) == len(b) == 1 and a != b], dtype=int).reshape(-1, 2)
    return np.concatenate([single, single[:, ::-1]])


@torch.no_grad()
def profession_pronouns(model, tokenizer, professions: pd.DataFrame) -> pd.DataFrame:
    """For each sense, how its push of "he" over "she" goes with the share of men in a profession.

    professions: profession and percent_women. Columns: rho (Spearman), p, and push, the standard deviation
    of the push over professions, in logits.
    """
    ids = [tokens_of_word(tokenizer, name)[-1] for name in professions["profession"]]
    he, she = (tokens_of_word(tokenizer, word)[0] for word in ("he", "she"))
    embeddings = model.get_output_embeddings().weight
    push = vectors_of_tokens(model, torch.tensor(ids, device=model.device)) @ (embeddings[he] - embeddings[she])
    push = push.float().cpu().numpy()
    tests = [spearmanr(column, 100 - professions["percent_women"]) for column in push.T]
    return pd.DataFrame(
        {"rho": [t.statistic for t in tests], "p": [t.pvalue for t in tests], "push": push.std(0, ddof=1)}
    )
