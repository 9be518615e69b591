"""Learn, train and take apart Backpack language models."""

from backpack_lib.config import TrainingConfig
from backpack_lib.loading import load
from backpack_lib.model import BackpackConfig, BackpackLMHeadModel, BackpackModel
from backpack_lib.training import train

__all__ = ["BackpackConfig", "BackpackLMHeadModel", "BackpackModel", "TrainingConfig", "load", "train"]
