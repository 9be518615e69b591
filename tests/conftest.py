"""What several tests read: a small random Backpack and its tokenizer."""

import pytest
from helpers import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), num_senses=4)
