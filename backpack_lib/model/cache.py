"""What is kept of a text while more of it is written: by transformers' cache, and beside it.

A sense layer's keys are kept like an attention layer's, but no values: senses depend on the token alone. So the cache
holds the tokens, and a table beside it their senses, one row for each distinct token of all texts of the batch.

Shapes: batch B, tokens so far S, width d, senses k, vocabulary V.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# What arguments and outputs of transformers' models call a cache: it was renamed in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def sense_layer(cache: Cache, n_layer: int):
    """The sense layer's part of a cache, added if the cache has the trunk's layers only."""
    if len(cache.layers) == n_layer:
        trunk = cache.layers[0]
        cache.layers.append(StaticLayer(trunk.max_cache_len) if isinstance(trunk, StaticLayer) else DynamicLayer())
    return cache.layers[n_layer]


class SenseTable:
    """The senses of the tokens in a cache: a row, (k, d), for each distinct token and for each embedding without one.

    An embedding that belongs to no token stands in the cache under the number V + its row.
    """

    def __init__(self, vocab_size: int, device):
        self.row_of = torch.full((vocab_size,), -1, device=device)  # -1: the token has no row yet
        self.rows, self.size = None, 0
        self.patches = ()

    def hold_under(self, patches: list):
        """Forgets the tokens' senses if other patches apply than before."""
        patches = tuple(map(id, patches))
        if self.patches != patches:
            self.row_of.fill_(-1)
            self.patches = patches

    def append(self, senses: torch.Tensor) -> torch.Tensor:
        """Adds rows and returns their numbers. (n, k, d) -> (n,)"""
        start, self.size = self.size, self.size + len(senses)
        if self.rows is None:
            self.rows = senses
        elif senses.requires_grad or self.rows.requires_grad:
            self.rows = torch.cat([self.rows[:start], senses])
        else:
            if self.size > len(self.rows):  # twice the room, so that few rows are copied often
                room = self.rows.new_empty(2 * self.size, *senses.shape[1:])
                room[:start] = self.rows[:start]
                self.rows = room
            self.rows[start : self.size] = senses
        return torch.arange(start, self.size, device=self.row_of.device)

    def look_up(self, ids: torch.Tensor, senses_of) -> tuple[torch.Tensor, torch.Tensor]:
        """The senses of all tokens and the row of each; `senses_of` computes those not known. (B, S) -> (n, k, d), (B, S)"""
        vocab_size = len(self.row_of)
        tokens = ids.clamp(max=vocab_size - 1)
        unknown = ids[(self.row_of[tokens] < 0) & (ids < vocab_size)].unique()
        if len(unknown):
            self.row_of[unknown] = self.append(senses_of(unknown))
        return self.rows[: self.size], torch.where(ids < vocab_size, self.row_of[tokens], ids - vocab_size)
