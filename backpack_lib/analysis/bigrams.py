"""How much of a prediction is the last word's alone? Its own senses, against a bigram model that counts.

Logits are a sum over tokens, so they split exactly into what the last token's senses contribute and what all others do.
With only the last token's senses kept, a Backpack predicts from one token, as a bigram model does.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array

from backpack_lib.analysis.scores import batches
from backpack_lib.model.kinds import require_senses

DISCOUNT = 0.75  # taken off each counted pair and given to the backing-off


class Bigrams:
    """p(y | x) counted on text, with absolute discounting: what is taken off each pair goes to the frequency of y.

    rows: of token ids. Frequencies are counted with one added for each token, so that nothing is impossible.
    """

    def __init__(self, rows: Iterable[list[int]], vocabulary: int):
        pairs = [np.stack([row[:-1], row[1:]]) for row in map(np.asarray, rows) if len(row) > 1]
        x, y = np.concatenate(pairs, axis=1)
        self.counts = coo_array((np.ones(len(x)), (x, y)), shape=(vocabulary, vocabulary)).tocsr()
        self.of_x = np.asarray(self.counts.sum(axis=1)).ravel()
        self.kinds = np.diff(self.counts.indptr)  # different y after x
        frequency = np.bincount(y, minlength=vocabulary) + 1.0
        self.unigram = frequency / frequency.sum()

    def log_probs(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """log p(y | x) of pairs, (n,)."""
        met = np.maximum(self.of_x[x], 1)
        counted = np.maximum(np.asarray(self.counts[x, y]).ravel() - DISCOUNT, 0) / met
        left = np.where(self.of_x[x] > 0, DISCOUNT * self.kinds[x] / met, 1.0)
        return np.log(counted + left * self.unigram[y])


@torch.no_grad()
def losses_by_part(model, rows: list[list[int]], bigrams: Bigrams | None = None) -> pd.DataFrame:
    """Nats of every predicted token, a row for each, by all tokens and by the last token's senses alone.

    "last token": its senses, with the weights that they have. "last token, renormalised": each with weight one, as if
    the text had no other token. With counted bigrams, their loss, too, and that of the frequencies of words. "last" and
    "next" are the ids of the last and of the predicted token.
    """
    require_senses(model)
    E = model.get_output_embeddings().weight * getattr(model, "logit_scale", 1.0)
    tables = []
    for _, ids, mask in batches(model, rows):
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        here = mask[:, 1:].bool()
        nexts = ids[:, 1:][here]
        weights = out.contextualization.diagonal(dim1=2, dim2=3)[..., :-1].transpose(1, 2)[here]  # (n, k)
        senses = out.senses[:, :, :-1].transpose(1, 2)[here]  # (n, k, d)
        logits = {
            "model": out.logits[:, :-1][here],
            "last token": (weights[..., None] * senses).sum(1) @ E.T,
            "last token, renormalised": senses.sum(1) @ E.T,
        }
        nats = {name: F.cross_entropy(part.float(), nexts, reduction="none").cpu() for name, part in logits.items()}
        tables.append(pd.DataFrame(nats | {"last": ids[:, :-1][here].cpu(), "next": nexts.cpu()}))
    table = pd.concat(tables, ignore_index=True)
    if bigrams is not None:
        table["counted bigrams"] = -bigrams.log_probs(table["last"].to_numpy(), table["next"].to_numpy())
        table["counted words"] = -np.log(bigrams.unigram[table["next"]])
    return table
