"""What several tests read: a small random Backpack and its tokenizer, and a run of 01_training as it stands."""

import pytest
from helpers import tiny_model, tiny_tokenizer

from backpack_lib.running.notebook import run_notebook


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), num_senses=4)


@pytest.fixture(scope="session")
def planted_run():
    """01_training as it stands, in the tests' own folder for runs; it goes on from what is there."""
    outcome = run_notebook("01_training")
    assert not outcome.failed, outcome.result
    return outcome
