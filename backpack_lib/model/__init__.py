"""The Backpack model, on transformers' own classes."""

from backpack_lib.model.backpack import BackpackConfig, BackpackLMHeadModel, BackpackModel

__all__ = ["BackpackConfig", "BackpackLMHeadModel", "BackpackModel"]
