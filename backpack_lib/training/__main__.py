"""Trains from the command line; the flags are the settings of `TrainingConfig`."""

import sys

from accelerate.state import PartialState
from transformers import HfArgumentParser

from backpack_lib.files import exit_status
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train


def main() -> int:
    """Trains from the command line."""
    parser = HfArgumentParser(
        TrainingConfig,
        prog="python -m backpack_lib.training",
        description="Trains a model, or resumes the run that OUT holds.",
    )

    def work():
        (config,) = parser.parse_args_into_dataclasses()
        history = train(config)
        state = PartialState()
        if state.is_main_process:
            print(history.tail(1).to_string(index=False))
            print(f"The model is in {config.out}/model.")
        # A process that leaves a group of CPUs open now and then dies of SIGABRT when Python ends.
        state.destroy_process_group()

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
