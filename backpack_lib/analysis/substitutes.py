"""What people use where a prediction cannot be split exactly: attention weights, and gradient times input.

Each gives a number for every token of a text.
"""

import torch

from backpack_lib.model.kinds import require_transformer


@torch.no_grad()
def attention_of_tokens(transformer, ids: list[int]) -> torch.Tensor:
    """A Transformer's attention from the last token, the mean over layers and heads, (T,)."""
    require_transformer(transformer)
    used = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")  # the others do not return it
    try:
        rows = torch.tensor([ids], device=transformer.device)
        attentions = transformer(
            rows, attention_mask=torch.ones_like(rows), output_attentions=True, use_cache=False
        ).attentions
    finally:
        transformer.set_attn_implementation(used)
    return torch.stack(attentions)[:, 0, :, -1].mean((0, 1))


def gradient_times_input(transformer, ids: list[int], a: int, b: int) -> torch.Tensor:
    """The log-odds' gradient at each token's embedding times that embedding, (T,)."""
    require_transformer(transformer)
    rows = torch.tensor([ids], device=transformer.device)
    inputs = transformer.get_input_embeddings()(rows).detach().requires_grad_()
    logits = transformer(inputs_embeds=inputs, attention_mask=torch.ones_like(rows), use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(logits[a] - logits[b], inputs)
    return (gradient * inputs).sum(-1)[0].detach()
