"""Senses of two models side by side: which sense of one is which of the other, and how alike are they?"""

import numpy as np
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


def match_null(one: np.ndarray, other: np.ndarray, permutations: int = 100, seed: int = 0) -> np.ndarray:
    """The mean likeness of the best match when each word's senses are permuted in the second model, (permutations,).

    If the number of a sense meant nothing, so that any sense of a word could stand for any other, this is what
    matching, which takes the best of many, would find.
    """
    rng, found = np.random.default_rng(seed), []
    k, words, _ = other.shape
    flat = np.einsum("lxy,mxy->xlm", one, other)  # (words, k, k')
    for _ in range(permutations):
        order = rng.permuted(np.tile(np.arange(k), (words, 1)), axis=1)
        mixed = np.take_along_axis(flat, order[:, None, :], axis=2).mean(0)
        found.append(match(mixed)[1])
    return np.array(found)


def compare_models(one, other, tokens: torch.Tensor, among: torch.Tensor, seed: int = 0) -> dict:
    """-> matched: the mean likeness of matched senses; partners; random: the mean over all pairs of senses; null:
    the 95 % quantile of `match_null`; p; and table, the likeness of all pairs.
    """
    a, b = (profiles(model, tokens, among) for model in (one, other))
    table = likeness(a, b)
    partners, matched = match(table)
    null = match_null(a, b, seed=seed) if table.size > 1 else np.array([np.nan])  # one sense has no other place
    return {
        "table": table, "partners": partners, "matched": matched, "random": float(table.mean()),
        "null": float(np.quantile(null, 0.95)), "p": p_value(null, matched) if table.size > 1 else np.nan,
    }  # fmt: skip
