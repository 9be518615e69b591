"""The training loop."""

from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

__all__ = ["TrainingConfig", "train"]
