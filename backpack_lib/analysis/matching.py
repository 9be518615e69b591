"""Senses of two models side by side: which sense of one is which of the other, and how alike are they?"""

from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from backpack_lib.analysis.senses import vectors_of_tokens
from backpack_lib.analysis.statistics import p_value


@torch.inference_mode()
def profiles(model, tokens: torch.Tensor, among: torch.Tensor) -> np.ndarray:
    """What each sense pushes for each of some words, beyond what it pushes for all of them, (k, tokens, among).

    Of length one for each sense and word. A Transformer's input embedding stands in as one sense.
    """
    E = model.get_output_embeddings().weight[among]
    pushes = (vectors_of_tokens(model, tokens) @ E.T).transpose(0, 1).float().cpu().numpy()  # (k, tokens, among)
    pushes = pushes - pushes.mean(-1, keepdims=True)
    pushes = pushes - pushes.mean(1, keepdims=True)
    return pushes / np.maximum(np.linalg.norm(pushes, axis=-1, keepdims=True), 1e-12)


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How alike senses of two models are: the mean over words of the correlation of their pushes, (k, k')."""
    return np.einsum("lxy,mxy->lm", one, other) / one.shape[1]


def match(table: np.ndarray) -> tuple[np.ndarray, float]:
    """Each sense's partner in the second model, such that their likeness is greatest in sum; and its mean."""
    rows, columns = linear_sum_assignment(-table)
    return columns, float(table[rows, columns].mean())


def match_null(one: np.ndarray, other: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean likeness of the best match when each word's senses are permuted in the second model, a hundred times.

    If the number of a sense meant nothing, so that any sense of a word could stand for any other, this is what
    matching, which takes the best of many, would reach.
    """
    rng = np.random.default_rng(seed)
    k, words, _ = other.shape
    of_words = np.einsum("lxy,mxy->xlm", one, other)  # (words, k, k')
    likenesses = []
    for _ in range(100):
        order = rng.permuted(np.tile(np.arange(k), (words, 1)), axis=1)
        permuted = np.take_along_axis(of_words, order[:, None, :], axis=2)
        likenesses.append(match(permuted.mean(0))[1])
    return np.array(likenesses)


def compare_models(
    models: dict, tokens: torch.Tensor, among: torch.Tensor, seed: int = 0
) -> tuple[pd.DataFrame, dict[tuple[str, str], np.ndarray]]:
    """Of each pair of models, a row, and the senses' partners, (k,).

    Columns: matched (the mean likeness of partners), random pairs (of all pairs of senses), null (the 95 % quantile of
    `match_null`) and p, both NaN for models of one sense.
    """
    of_models = {name: profiles(model, tokens, among) for name, model in models.items()}
    rows, partners = [], {}
    for one, other in combinations(models, 2):
        table = likeness(of_models[one], of_models[other])
        partners[one, other], matched = match(table)
        row = {"one": one, "other": other, "matched": matched, "random pairs": table.mean()}
        row |= {"null (95 %)": np.nan, "p": np.nan}
        if table.size > 1:  # one sense has no other place
            null = match_null(of_models[one], of_models[other], seed)
            row |= {"null (95 %)": np.quantile(null, 0.95), "p": p_value(null, matched)}
        rows.append(row)
    return pd.DataFrame(rows), partners
