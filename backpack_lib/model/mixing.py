"""A Backpack's prediction: sense vectors, weighted by one causal softmax per sense and summed.

Done as the equation says, this makes tensors of k x T x T and k x T x d numbers, most of which are thrown away.
`mix_senses` takes one sense and one block of positions at a time, leaves out later positions, and computes the
weights again in a backward pass of its own. It equals `weighted_sum` of the weights of `contextualize`.

Shapes: batch B, new tokens T, all tokens so far S (= T without a cache), width d, senses k, distinct tokens n, and
d_s = floor(d / k), the width of a sense's queries and keys.
"""

import torch
import torch.nn.functional as F

POSITIONS_AT_ONCE = {"cpu": 64, "cuda": 512}  # a CPU keeps what a small block needs in its cache
# Where compiled code takes blocks, too. A CPU does not: a compiled training step of demo size (bf16, 16 x 256 tokens)
# takes 1.06 s with the equation, which is fused with what stands around it, and 1.40 s with blocks. (Alone, forward and
# backward, the compiled equation takes 0.42 s, blocks 0.31 s, and `scaled_dot_product_attention(q, k, senses).sum(1)`
# 0.63 s.) For a GPU this is an estimate: at 32 x 512 tokens all weights are 537 MB in float32, read and written several
# times, those of one sense 33 MB, which its cache holds; and no fast kernel of attention takes values of width 768.
COMPILED_IN_BLOCKS = ("cuda",)
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

    One product over (sense, position) pairs, so that the sum over senses happens inside it and
    nothing of the size k x T x d comes out. For a single new token that would be the lesser evil:
    the product needs a copy of all senses if they lie in a cache.
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
    """`weighted_sum(alpha, at_positions(table, inverse))`, which reads the table in place: no copy for each position.

    (B, k, T, S), (n, k, d), (B, S) -> (B, T, d)
    """
    B, k, T, _ = alpha.shape
    rows = rows_at(inverse, k).flatten(1).repeat_interleave(T, dim=0)  # (B T, k S)
    weights = alpha.to(table.dtype).transpose(1, 2).reshape(B * T, -1)
    return F.embedding_bag(rows, table.flatten(0, 1), per_sample_weights=weights, mode="sum").view(B, T, -1)


def mix_senses(queries, keys, table, inverse, allowed):
    """`weighted_sum(contextualize(queries, keys, allowed), at_positions(table, inverse))`, in less time and memory.

    queries (B, k, T, d_s), of the last positions; keys (B, k, S, d_s); table (n, k, d): the senses of distinct tokens;
    inverse (B, S): which of them stands where; allowed: broadcastable to (B, 1, T, S) and false for later positions.
    """
    n_new, n_total, compiling = queries.shape[2], keys.shape[2], torch.compiler.is_compiling()
    if n_new < min(n_total, FEW) and not compiling:
        return sum_from_table(contextualize(queries, keys, allowed), table, inverse)
    compiled_whole = compiling and inverse.device.type not in COMPILED_IN_BLOCKS
    if n_new < n_total or compiled_whole or inverse.numel() * table[0].numel() < SMALL:
        return weighted_sum(contextualize(queries, keys, allowed), at_positions(table, inverse))
    return _mix_in_blocks(queries, keys, table, inverse, allowed.expand(len(inverse), 1, -1, -1)[:, 0])


def _blocks(inverse) -> list[tuple[slice, slice]]:
    """The positions of each block, and all positions that they may look at."""
    length, step = inverse.shape[1], POSITIONS_AT_ONCE.get(inverse.device.type, 512)
    stops = [min(start + step, length) for start in range(0, length, step)]
    return [(slice(start, stop), slice(stop)) for start, stop in zip([0, *stops], stops)]


def in_blocks(
    queries: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, inverse: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """The weighted sum, one sense and one block of positions at a time."""
    mixed = torch.zeros(*inverse.shape, table.shape[-1], dtype=sum_type(table), device=table.device)
    with torch.autocast(table.device.type, enabled=False):
        for sense in range(table.shape[1]):
            query, key, value = queries[:, sense], keys[:, sense], F.embedding(inverse, table[:, sense])
            for now, before in _blocks(inverse):
                alpha = contextualize(query[:, now], key[:, before], allowed[:, now, before])
                mixed[:, now] += alpha.to(value.dtype) @ value[:, before]
    return mixed.to(table.dtype)


def gradients_in_blocks(
    d_mixed: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, inverse: torch.Tensor,
    allowed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and table, for which the weights are computed again.

    With S = q K^T / sqrt(d_s), A = softmax(S), o = A C for each sense, and dX the gradient of X:
    dC = A^T do, and dA = do C^T;
    dS = A * (dA - rowsum(A * dA)), which is the softmax's backward;
    dq = dS K / sqrt(d_s), and dK = dS^T q / sqrt(d_s). A token's gradient is the sum of dC over its places.
    """
    d_queries, d_keys, d_table = map(torch.empty_like, (queries, keys, table))
    scale = queries.shape[-1] ** -0.5
    with torch.autocast(table.device.type, enabled=False):
        for sense in range(table.shape[1]):
            query, key, value = queries[:, sense], keys[:, sense], F.embedding(inverse, table[:, sense])
            d_key = torch.zeros_like(key, dtype=sum_type(key))
            d_value = torch.zeros_like(value, dtype=sum_type(value))
            for now, before in _blocks(inverse):
                alpha = contextualize(query[:, now], key[:, before], allowed[:, now, before])
                d_value[:, before] += alpha.to(value.dtype).transpose(1, 2) @ d_mixed[:, now]
                d_alpha = (d_mixed[:, now] @ value[:, before].transpose(1, 2)).to(alpha.dtype)
                d_scores = torch.ops.aten._softmax_backward_data(d_alpha, alpha, -1, alpha.dtype)
                d_scores = (d_scores * scale).to(key.dtype)
                d_queries[:, sense, now] = d_scores @ key[:, before]
                d_key[:, before] += d_scores.transpose(1, 2) @ query[:, now]
            d_keys[:, sense] = d_key
            d_table[:, sense] = torch.ops.aten.embedding_dense_backward(d_value, inverse, len(table), -1, False)
    return d_queries, d_keys, d_table


# Operations of their own, into which a compiler does not look: it would write out each round of the loops.
_mix_in_blocks = torch.library.custom_op("backpack::mix_senses", in_blocks, mutates_args=())
_gradients_in_blocks = torch.library.custom_op("backpack::mix_senses_backward", gradients_in_blocks, mutates_args=())


@_mix_in_blocks.register_fake
def _(queries, keys, table, inverse, allowed):
    return table.new_empty(*inverse.shape, table.shape[-1])


@_gradients_in_blocks.register_fake
def _(d_mixed, queries, keys, table, inverse, allowed):
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(table)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_mixed):
    return *_gradients_in_blocks(d_mixed, *ctx.saved_tensors), None, None


_mix_in_blocks.register_autograd(_backward, setup_context=_keep_inputs)
