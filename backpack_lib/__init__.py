"""Learn, train and take apart Backpack language models."""

from backpack_lib.attribution import attribute
from backpack_lib.config import TrainingConfig
from backpack_lib.edits import SenseEdits
from backpack_lib.loading import load
from backpack_lib.model import BackpackConfig, BackpackLMHeadModel, BackpackModel

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


def __getattr__(name: str):
    # Imported when asked for, because Python warns if `python -m backpack_lib.training` finds it imported already.
    if name == "train":
        from backpack_lib.training import train

        return train
    raise AttributeError(f"module 'backpack_lib' has no attribute {name!r}")
