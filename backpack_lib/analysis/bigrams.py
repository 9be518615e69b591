"""How much of a prediction is the last word's alone? Its own senses, against a bigram model that counts.

Logits are a sum over tokens, so they split exactly into what the last token's senses contribute and what all others do.
With only the last token's senses kept, a Backpack predicts from one token, as a bigram model does.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.stats import rankdata

from backpack_lib.analysis.scores import batches
from backpack_lib.model.kinds import require_senses

DISCOUNT = 0.75  # taken off each counted pair and given to the backing-off


class Bigrams:
    """p(y | x) counted on text, with absolute discounting: what is taken off each pair goes to the frequency of y.

    rows: of token ids. Frequencies are counted with one added for each token, so that nothing is impossible.
    """

    def __init__(self, rows: Iterable[list[int]], vocabulary: int):
        pairs = [np.stack([row[:-1], row[1:]]) for row in map(np.asarray, rows) if len(row) > 1]
        if not pairs:
            raise ValueError("There is no text to count bigrams in; give at least one with two tokens.")
        x, y = np.concatenate(pairs, axis=1)
        self.counts = coo_array((np.ones(len(x)), (x, y)), shape=(vocabulary, vocabulary)).tocsr()
        self.of_x = np.asarray(self.counts.sum(axis=1)).ravel()
        self.kinds = np.diff(self.counts.indptr)  # different y after x
        frequency = np.bincount(y, minlength=vocabulary) + 1.0
        self.unigram = frequency / frequency.sum()

    def log_probs(self, x: int) -> np.ndarray:
        """log p(y | x) of all y, (V,)."""
        if not self.of_x[x]:
            return np.log(self.unigram)
        counted = np.maximum(self.counts[[x]].toarray()[0] - DISCOUNT, 0) / self.of_x[x]
        return np.log(counted + DISCOUNT * self.kinds[x] / self.of_x[x] * self.unigram)

    def of_pairs(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """log p(y | x) of pairs, (n,)."""
        known = np.maximum(self.of_x[x], 1)
        counted = np.maximum(np.asarray(self.counts[x, y]).ravel() - DISCOUNT, 0) / known
        left = np.where(self.of_x[x] > 0, DISCOUNT * self.kinds[x] / known, 1.0)
        return np.log(counted + left * self.unigram[y])


@torch.inference_mode()
def losses_by_part(model, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Nats of every predicted token, (n,), by all tokens, and by the last token's senses alone.

    "last token": its senses, with the weights that they have. "last token, renormalised": each with weight one, as if
    the text had no other token. "last" and "next" are the ids of the last and of the predicted token.
    """
    require_senses(model)
    E = model.get_output_embeddings().weight
    found = {"model": [], "last token": [], "last token, renormalised": [], "last": [], "next": []}
    for _, ids, mask in batches(model, rows):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        here = mask[:, 1:].bool()
        weights = out.contextualization.diagonal(dim1=2, dim2=3)[..., :-1].transpose(1, 2)[here]  # (n, k)
        senses = out.senses[:, :, :-1].transpose(1, 2)[here]  # (n, k, d)
        nexts = ids[:, 1:][here]
        states = {
            "model": out.last_hidden_state[:, :-1][here],
            "last token": (weights[..., None] * senses).sum(1),
            "last token, renormalised": senses.sum(1),
        }
        for name, state in states.items():
            found[name].append(F.cross_entropy((state @ E.T).float(), nexts, reduction="none").cpu().numpy())
        found["last"].append(ids[:, :-1][here].cpu().numpy())
        found["next"].append(nexts.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@torch.inference_mode()
def bigram_correlations(
    model, bigrams: Bigrams, tokens: torch.Tensor, among: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Is a sense the bigram model? Spearman's rho of each sense's pushes and counted log p(y | x) - log p(y).

    tokens: words x; among: words y to rank. -> mean over words (k,), and the same with another word's counts in the
    place of each word's (k,), which says what words have in common.
    """
    pushes = (
        (model.sense_vectors(tokens.to(model.device)) @ model.get_output_embeddings().weight[among].T).cpu().numpy()
    )  # (n, k, m)
    chosen = among.cpu().numpy()
    counted = np.stack([bigrams.log_probs(int(x))[chosen] - np.log(bigrams.unigram[chosen]) for x in tokens])  # (n, m)
    ranks, of_counts = (_standardised(rankdata(table, axis=-1)) for table in (pushes, counted))
    rho = np.einsum("nkm,nm->nk", ranks, of_counts)
    null = np.einsum("nkm,nm->nk", ranks, np.roll(of_counts, 1, axis=0))
    return rho.mean(0), null.mean(0)


def _standardised(table: np.ndarray) -> np.ndarray:
    """Rows of mean zero and length one, so that a product of two is their correlation."""
    table = table - table.mean(-1, keepdims=True)
    return table / np.maximum(np.linalg.norm(table, axis=-1, keepdims=True), 1e-12)
