"""Trains a model, or resumes the run that OUT holds; the flags are the settings of `TrainingConfig`."""

import sys

from accelerate.state import PartialState
from transformers import HfArgumentParser

from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train


def main():
    parser = HfArgumentParser(TrainingConfig, prog="python -m backpack_lib.training", description=__doc__)
    try:
        (config,) = parser.parse_args_into_dataclasses()
        history = train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(history.tail(1).to_string(index=False))
        print(f"The model is in {config.out}/model.")
    # A process that leaves a group of CPUs open now and then dies of SIGABRT when Python ends.
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
