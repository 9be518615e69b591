"""Learn, train and take apart Backpack language models."""

from backpack_lib.analysis.attribution import attribute
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.loading import load
from backpack_lib.model import BackpackConfig, BackpackLMHeadModel, BackpackModel
from backpack_lib.training import TrainingConfig, train

__all__ = [
    "BackpackConfig",
    "BackpackLMHeadModel",
    "BackpackModel",
    "SenseEdits",
    "TrainingConfig",
    "attribute",
    "load",
    "train",
]
