"""A Backpack's prediction: sense vectors, weighted by one causal softmax per sense and summed.

Done as the equation says, this makes tensors of k x T x T and k x T x d numbers, most of which are thrown away.
`mix_senses` takes one sense at a time, and in a backward pass computes its weights again instead of keeping them.

Shapes are those of `backpack.py`.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FEW = 8  # new positions; for more, a copy of the senses at each pays
SMALL = 2**22  # numbers in the senses of all positions; below, many small products cost more than one


def sum_type(tensor) -> torch.dtype:
    """What sums of many terms are taken in: float32, or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def contextualize(queries, keys, allowed):
    """The contextualisation weights alpha: one causal softmax per sense.

    queries (B, k, T, d_s), keys (B, k, S, d_s), allowed broadcastable to (B, 1, T, S)
    -> (B, k, T, S), each row summing to one.
    """
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    # The lowest finite number, not -inf: a padded position may attend to nothing at all.
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1, dtype=sum_type(scores))


def weighted_sum(alpha, senses):
    """Sum over earlier tokens and their senses. (B, k, T, S), (B, k, S, d) -> (B, T, d)

    One product over (sense, position) pairs, so that nothing of the size k x T x d comes out; of one new token it is small.
    """
    if alpha.shape[2] == 1:
        return (alpha.to(senses.dtype) @ senses).sum(1)
    return alpha.to(senses.dtype).transpose(1, 2).flatten(2) @ senses.flatten(1, 2)


def rows_at(inverse, k):
    """The rows of a table of (n k) senses that stand at each position. (B, T) -> (B, k, T)"""
    return inverse[:, None, :] * k + torch.arange(k, device=inverse.device)[:, None]


def at_positions(table, inverse):
    """The senses at each position. (n, k, d), (B, T) -> (B, k, T, d)"""
    return F.embedding(rows_at(inverse, table.shape[1]), table.flatten(0, 1))


def sum_from_table(alpha, table, inverse):
    """`weighted_sum(alpha, at_positions(table, inverse))` without a copy of the senses for each position."""
    B, k, T, _ = alpha.shape
    rows = rows_at(inverse, k).flatten(1).repeat_interleave(T, dim=0)  # (B T, k S)
    weights = alpha.to(table.dtype).transpose(1, 2).reshape(B * T, -1)
    return F.embedding_bag(rows, table.flatten(0, 1), per_sample_weights=weights, mode="sum").view(B, T, -1)


def mix_senses(queries, keys, table, inverse, allowed):
    """`weighted_sum(contextualize(queries, keys, allowed), at_positions(table, inverse))`, in less time and memory.

    queries (B, k, T, d_s), of the last positions; keys (B, k, S, d_s); table (n, k, d): the senses of distinct tokens;
    inverse (B, S): which of them stands where; allowed: broadcastable to (B, 1, T, S) and false for later positions.
    """
    n_new, n_total = queries.shape[2], keys.shape[2]
    compiling = torch.compiler.is_compiling()  # the equation is then fused with what stands around it
    if n_new < min(n_total, FEW) and not compiling:
        return sum_from_table(contextualize(queries, keys, allowed), table, inverse)
    if n_new < n_total or compiling or inverse.numel() * table[0].numel() < SMALL:
        return weighted_sum(contextualize(queries, keys, allowed), at_positions(table, inverse))
    mixed = 0.0
    for parts in zip(queries.unbind(1), keys.unbind(1), table.unbind(1)):
        mixed = mixed + checkpoint(
            _sum_of_sense, *parts, inverse, allowed, use_reentrant=False, preserve_rng_state=False
        )
    return mixed.to(table.dtype)


def _sum_of_sense(query, key, senses, inverse, allowed):
    """The weighted sum of one sense. (B, T, d_s) twice, (n, d), (B, T) -> (B, T, d)"""
    alpha = contextualize(query[:, None], key[:, None], allowed)[:, 0]
    return (alpha.to(senses.dtype) @ F.embedding(inverse, senses)).to(sum_type(senses))
