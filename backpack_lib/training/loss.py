"""The loss of a language model without its logits: a vocabulary of 16,000 makes them the largest tensor by far.

Logits, their softmax and the gradient are made for some rows at a time and thrown away. Since the
loss is a mean, its gradient is known as soon as the logits are, so nothing is computed twice.

torch's own `F.linear_cross_entropy` does the same. In 2.13 it gives the loss of bf16 logits in bf16: off by .01 to .1
nats at 2,040 x 16,000 logits, under every one of its options (this one: .0002), and is no faster on a CPU.
"""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from backpack_lib.model.backpack import BackpackLMHeadModel, distinct_tokens

# Logits held at once. On a CPU they should stay in its cache; a GPU wants large products.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}

# Attention for which transformers makes no mask, since it knows of no function that would.
WHOLE_ROWS = "causal over whole rows"
AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)


@contextmanager
def whole_rows(model):
    """The model without padding: its attention is causal, and nothing else.

    Otherwise transformers looks at each forward pass whether several texts share a row, for which a GPU has to be
    waited for; and compiled it masks as if they did, so that no fast kernel for causal attention can be taken.
    """
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = WHOLE_ROWS
    try:
        yield
    finally:
        config._attn_implementation = before


class LanguageModelLoss(nn.Module):
    """Mean nats per token of a model from `train` on some sequences: (B, T) -> scalar; equals its own `loss`.

    tokens, inverse: the distinct tokens of `input_ids`, if they are known; see `distinct_tokens`.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # asked for if the model is divided among processes

    def forward(self, input_ids, tokens=None, inverse=None):
        given = {}
        if isinstance(self.model, BackpackLMHeadModel):
            # At the start, so that all that follows can be compiled in one piece.
            known = tokens is not None
            given["distinct"] = (
                (tokens, inverse) if known else distinct_tokens(input_ids, torch.compiler.is_compiling())
            )
        with whole_rows(self.model):
            hidden = self.model.base_model(input_ids, use_cache=False, **given).last_hidden_state[:, :-1]
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, input_ids[:, 1:].flatten())


def linear_cross_entropy(hidden, weight, labels):
    """Mean cross-entropy of the logits `hidden @ weight.T`: (n, d), (V, d), (n,) -> scalar.

    The products are taken in the precision of the autocast region, if in one, and all else in float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, wants_gradient):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        rows = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2**24) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                label = labels[part, None]
                log_p = (hidden[part] @ weight.T).float().log_softmax(-1)
                total -= log_p.gather(1, label).sum()
                if wants_gradient:
                    # softmax minus one-hot, the gradient of the logits but for the mean, in their place
                    d_logits = log_p.exp_().scatter_add_(1, label, torch.full_like(log_p[:, :1], -1.0))
                    d_logits = d_logits.to(hidden.dtype)
                    torch.mm(d_logits, weight, out=d_hidden[part])
                    if d_logits.dtype == d_weight.dtype:
                        d_weight.addmm_(d_logits.T, hidden[part])
                    else:
                        d_weight += d_logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        d_loss = d_loss / len(d_hidden)
        # In place: the gradient of a large vocabulary would double the peak. A second pass is refused by autograd.
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss).to(d_hidden.dtype), None, None
