"""The loss of a language model in training: without padding, and without its logits."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from backpack_lib.model.backpack import BackpackLMHeadModel, distinct_tokens
from backpack_lib.model.output import linear_cross_entropy

# Attention for which transformers makes no mask, since it knows of no function that would.
WHOLE_ROWS = "causal over whole rows"
AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)


@contextmanager
def whole_rows(model):
    """The model without padding: its attention is causal, and nothing else.

    Otherwise transformers looks at each forward pass whether several texts share a row, which makes a GPU wait, and
    a compiled model masks as if they did, which keeps the fast kernel for causal attention from being used.
    """
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = WHOLE_ROWS
    try:
        yield
    finally:
        config._attn_implementation = before


class LanguageModelLoss(nn.Module):
    """Mean nats per token of a model on some sequences: (B, T) -> scalar; equals its own `loss`.

    distinct: what `distinct_tokens(input_ids)` returned, if it has been asked.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # FSDP asks for them

    def forward(self, input_ids, *distinct):
        known = {}
        if isinstance(self.model, BackpackLMHeadModel):
            # First of all, so that everything after it can be compiled in one piece.
            known["distinct"] = distinct or distinct_tokens(input_ids, padded=torch.compiler.is_compiling())
        with whole_rows(self.model):
            hidden = self.model.base_model(input_ids, use_cache=False, **known).last_hidden_state[:, :-1]
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, input_ids[:, 1:].flatten())
