"""Backpack or Transformer: what the rest of the library asks of a model before it works with it."""

from numbers import Integral

import torch


def has_senses(model) -> bool:
    return hasattr(model, "sense_vectors")


def require_senses(model):
    """Raises ValueError if the model is no Backpack."""
    if not has_senses(model):
        raise ValueError(f"This takes a Backpack; a {type(model).__name__} has no sense vectors.")


def require_transformer(model):
    """Raises ValueError for a Backpack."""
    if has_senses(model):
        raise ValueError("This is for a Transformer, and the model given is a Backpack; load its baseline.")


def check_sense(model, sense: int) -> int:
    """Raises ValueError if the model has no such sense."""
    k = model.config.num_senses
    if not is_index(sense, k):
        raise ValueError(f"sense={sense!r} is out of range; this model has the senses 0 to {k - 1}.")
    return int(sense)


def is_index(number, size: int) -> bool:
    """Whether a number, of Python or of numpy, counts one of `size` things from 0."""
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= number < size


def used_tokens(model) -> torch.Tensor:
    """The ids of the vocabulary's rows that stand for a token."""
    return torch.arange(getattr(model.config, "used_vocab_size", None) or model.config.vocab_size, device=model.device)


def suppress_unused_rows(model):
    """Has `generate()` never pick a row of the vocabulary that stands for no token."""
    used, rows = getattr(model.config, "used_vocab_size", None), model.config.vocab_size
    if used not in (None, rows):
        model.generation_config.suppress_tokens = list(range(used, rows))
