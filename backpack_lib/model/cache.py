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


def remember(cache: Cache, n_layer: int, keys: torch.Tensor, ids: torch.Tensor):
    """Adds new positions to the sense layer; of all so far: keys (B, k, S, d_s) and token ids (B, S)."""
    values = ids[:, None, :, None].expand(-1, keys.shape[1], -1, -1)  # a static cache has them for each head
    keys, values = cache.update(keys, values, n_layer)
    return keys, values[:, 0, :, 0]


def sense_table(cache: Cache, n_layer: int, vocab_size: int, device) -> "SenseTable":
    """The table beside a cache; a new one if the cache is empty or went through a file."""
    if sense_layer(cache, n_layer).get_seq_length() == 0 or not hasattr(cache, "senses"):
        cache.senses = SenseTable(vocab_size, device)
    return cache.senses


class SenseTable:
    """The senses of what stands in a cache: a row, (k, d), for each distinct token and for each embedding without one.

    An embedding that belongs to no token stands in the cache under a number of its own, from V on.
    """

    def __init__(self, vocab_size: int, device):
        self.vocab_size = vocab_size
        self.row_of = torch.full((vocab_size,), -1, device=device)  # of each number; -1: it has none yet
        self.rows, self.size = torch.empty(0), 0
        self.patches = []

    def append(self, senses: torch.Tensor) -> torch.Tensor:
        """Adds rows and returns which they are. (n, k, d) -> (n,)"""
        start, self.size = self.size, self.size + len(senses)
        if senses.requires_grad or self.rows.requires_grad or self.size > len(self.rows):  # then never in place
            room = senses.new_empty(start, *senses.shape[1:])  # so that few rows are copied often
            self.rows = torch.cat([self.rows[:start].to(senses), senses, room])
        else:
            self.rows[start : self.size] = senses
        return torch.arange(start, self.size, device=self.row_of.device)

    def append_embeddings(self, senses: torch.Tensor) -> torch.Tensor:
        """Adds senses that belong to no token, and returns the numbers for them. (n, k, d) -> (n,)"""
        known = len(self.row_of)
        self.row_of = torch.cat([self.row_of, self.append(senses)])
        return torch.arange(known, len(self.row_of), device=self.row_of.device)

    def look_up(self, ids: torch.Tensor, senses_of, patches=()) -> tuple[torch.Tensor, torch.Tensor]:
        """All senses and the row of each number. (B, S) -> (n, k, d), (B, S)

        senses_of: computes the senses of tokens that are not known under these patches.
        """
        if list(map(id, patches)) != list(map(id, self.patches)):
            self.row_of[: self.vocab_size] = -1
            self.patches = list(patches)
        rows = self.row_of[ids]
        if rows.min() < 0:
            unknown = ids[rows < 0].unique()
            self.row_of[unknown] = self.append(senses_of(unknown))
            rows = self.row_of[ids]
        return self.rows[: self.size], rows
